"""Steering vectors: extraction, controls, projections, logit lens, files."""
