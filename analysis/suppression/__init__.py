"""Suppression of an agent's trait by a negative coefficient or by ablation."""
