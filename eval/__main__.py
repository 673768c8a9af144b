"""`python -m fledge.eval` is `fledge evaluate`."""

import sys

from fledge.conf.cli import main

main(["evaluate", *sys.argv[1:]])
