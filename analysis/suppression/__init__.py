"""Suppression of an agent by a negative coefficient or ablation."""
