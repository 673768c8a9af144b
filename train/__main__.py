"""`torchrun -m fledge.train` starts training on many processes."""

import sys

from fledge.conf.cli import main

main(["train", *sys.argv[1:]])
