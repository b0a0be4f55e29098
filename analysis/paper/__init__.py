"""Reproduction of the paper: all runs, pooled tables, claims and the results page."""
