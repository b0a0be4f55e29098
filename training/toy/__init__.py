"""The miniature: small generated worlds and a model trained on them from scratch."""
