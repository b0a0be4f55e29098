"""Models: load and identify checkpoints, find decoder blocks, register hooks."""
