"""Patching: activations of one run put into another."""
