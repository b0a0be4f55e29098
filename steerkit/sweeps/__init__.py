"""Sweeps: vector x layer x coefficient x prompt x sample, as one resumable table."""
