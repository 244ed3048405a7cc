"""`python -m fmristream` is `fmristream`."""

from fmristream.cli.main import run

run()
