"""Reproduction: runs, tables, claims and the results page."""
