"""Analyses of debate-trained models with steerkit; `python -m analysis` lists them."""
