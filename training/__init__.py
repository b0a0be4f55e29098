"""Internalized Multi-Agent Debate (IMAD): problems, debates, SFT, GRPO, evaluation; `python -m training` lists them."""
