"""Ways to get wrong numbers without an error, by topic. Each module has a dictionary `SILENT`.

An entry is `name: (check, ours, mutant)`. `check(implementation, folder)` passes for ours and fails for the
mutant, which runs without an error and gives a wrong result.
"""
