"""Statistics without a model: intervals and p-values, areas under curves, multiple comparisons."""
