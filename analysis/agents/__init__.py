"""Agent vectors: extraction, choice on validation, steering, fidelity, reliability."""
