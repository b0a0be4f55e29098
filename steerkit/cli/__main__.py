"""`python -m steerkit.cli` is the command `steerkit`."""

from steerkit.cli.main import main

main()
