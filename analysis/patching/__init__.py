"""Activation patching of real checkpoints and of trained debaters."""
