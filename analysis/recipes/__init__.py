"""Tables of the recipes on real checkpoints."""
