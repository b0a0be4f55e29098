"""IMAD training: collect debates, SFT on traces, GRPO, evaluation."""
