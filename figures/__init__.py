"""Figures from the tables of the analyses."""
