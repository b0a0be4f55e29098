"""Statistics without a model: bootstrap intervals, areas under curves, multiple comparisons."""
