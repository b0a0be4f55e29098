"""The names of the columns of a sweep's table. Imports no torch."""

KEYS = ["vector", "layer", "coefficient", "prompt_id", "sample"]
"""Columns that identify a row of generated texts."""
RESERVED = {
    "vector",
    "role",
    "control_of",
    "layer",
    "coefficient",
    "dose",
    "prompt_id",
    "sample",
    "prompt_ids",
    "messages",
    "ids",
    "text",
    "n_tokens",
    "finished",
    "choice",
    "log_prob",
    "probability",
    "relative_dose",
    "positions",
    "operation",
    "site",
    "when",
    "share_steered",
    "samples",
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "weights",
}
"""Columns that a sweep writes itself; neither a column of the prompts nor a score has one of these names."""
