"""Separability of agents by linear probes."""
