"""Training stages: SFT, GRPO, rewards, schedules, rollouts, checkpoints."""
