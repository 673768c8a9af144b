"""`python -m fledge.train` is `fledge train`: what torchrun, srun, deepspeed and accelerate start on many processes."""

import sys

from fledge.conf.cli import main

main(["train", *sys.argv[1:]])
