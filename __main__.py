"""`python -m fledge` is the `fledge` command."""

from fledge.conf.cli import main

main()
