"""Analyses of debate-trained models with steerkit."""
