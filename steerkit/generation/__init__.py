"""Generation: many differently steered rows over one KV cache."""
