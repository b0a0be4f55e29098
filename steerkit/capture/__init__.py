"""Capture: read the residual stream of texts into activations."""
