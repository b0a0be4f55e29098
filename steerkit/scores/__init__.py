"""Scores of texts: ROUGE-L, repetition, perplexity, KL divergence."""
