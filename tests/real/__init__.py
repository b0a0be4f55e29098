"""Tests on real checkpoints, which `make test-real` runs; they are not part of `make test`."""
