"""Toy setting: generated worlds, and a base model trained on them from scratch."""
