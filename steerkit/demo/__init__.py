"""Demo: three personas on a real model, from contrast pairs to a report."""
