"""Commands of `python -m training`, one file per stage; each reads files of the stages before it."""
