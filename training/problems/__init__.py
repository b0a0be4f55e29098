"""Problems with known answers: files, benchmarks, generated families, answer parsing."""
