"""Evaluation: single answer, self-consistency, debate, and their paired differences."""
