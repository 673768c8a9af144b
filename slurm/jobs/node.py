"""The processes of one node: `srun --ntasks-per-node=1 python -m fledge.slurm.jobs.node STAGE [option=value ...]`.

What torchrun would be, which turns every exit code into 1 and dies of SIGUSR1: one task a node starts a process a GPU,
the environment that torchrun makes lets all of them meet at the first node, signals reach every process, and the exit
code of the stage reaches srun, which the job needs to know whether to start again.
"""

import os
import sys

from ...conf.runtime.launch import environments, run_stage
from ...conf.runtime.rank_info import read_rank_info
from ...conf.runtime.signals import answered, deferred


def main(arguments: list[str]) -> int:
    """Run `N STAGE ...` with N processes on this node; return the exit code of the stage."""
    num_processes, *stage = arguments
    node = read_rank_info(os.environ)
    if node.world > 1 and node.local_world > 1:
        raise ValueError(f"srun must start one task a node, got {node.local_world}: --ntasks-per-node=1")
    with answered("node"), deferred("passed on to the processes of this node, which end first", then_stop=False):
        command = [sys.executable, "-m", "fledge", *stage]
        return run_stage(command, environments(int(num_processes), node if node.world > 1 else None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
