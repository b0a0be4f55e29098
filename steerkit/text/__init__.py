"""Text before a model reads it: prompts, token ids, spans, contrast pairs, debate traces."""
