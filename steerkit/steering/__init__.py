"""Steering: what is written to the residual stream, where, and how strongly."""
