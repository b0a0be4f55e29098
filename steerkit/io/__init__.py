"""Files on disk: atomic writes, JSON, JSON lines, tables with provenance, run folders, progress."""
