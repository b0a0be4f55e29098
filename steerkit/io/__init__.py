"""Files on disk and the processes that write them: atomic writes, JSON, tables, run folders, ranks, progress."""
