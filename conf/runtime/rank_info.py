"""Where a process stands among the ranks, read from the environment that its launcher made.

| launcher                            | says it by                                                                |
|-------------------------------------|---------------------------------------------------------------------------|
| torchrun, accelerate launch, by hand| RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT   |
| deepspeed                           | the same, but LOCAL_SIZE                                                  |
| srun, one task a rank               | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST     |
| none                                | nothing: one process, alone                                               |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """A process among all ranks, among those of its node, and where they meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # ranks on this node; by hand, without LOCAL_WORLD_SIZE: all
    address: str = "127.0.0.1"
    port: int = 0
    sees_own_gpus: bool = False  # and no others: the launcher has dealt them out

    def environment(self, num_gpus: int = 0) -> dict[str, str]:
        """Return the variables that torch, DeepSpeed and transformers read.

        To them LOCAL_RANK is the number of the GPU that the process computes on. So, if it sees GPUs, that is the first
        of its own, and LOCAL_WORLD_SIZE is how many it sees: read again, they give the same GPU.
        """
        device = own_gpus(self, num_gpus)[0] if num_gpus else self.local_rank
        values = (self.rank, self.world, device, self.address, self.port, num_gpus or self.local_world)
        return dict(zip((*_TORCH, "LOCAL_WORLD_SIZE"), map(str, values), strict=True))


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Read which rank this process is.

    torch's variables win: inside a Slurm step they are torchrun's, started by srun. MASTER_ADDR and MASTER_PORT alone
    say nothing: batch scripts export them for srun. ValueError if torch's are set in part, or contradict each other.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _of_torch(environment)
    return _of_slurm(environment) if _is_slurm_rank(environment) else RankInfo()


def _of_torch(environment: Mapping[str, str]) -> RankInfo:
    present = [f"{name}={environment[name]}" for name in _TORCH if environment.get(name)]
    if missing := [name for name in _TORCH if not environment.get(name)]:
        raise ValueError(
            f"{', '.join(missing)} must be set where {', '.join(present)} is: start by torchrun, srun or deepspeed, "
            "which set them all, or unset them for one process"
        )
    local_world = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), "WORLD_SIZE")
    rank, world, local_rank, local, port = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_world, "MASTER_PORT")
    )
    if rank >= world:
        raise ValueError(f"RANK must be below WORLD_SIZE={world}, got {rank}")
    return RankInfo(rank, world, local_rank, local, environment["MASTER_ADDR"], port)


def _is_slurm_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this is one of several tasks of an srun step.

    SLURM_PROCID and SLURM_NTASKS do not tell: the shell of a batch script has them too (0, and the tasks *allowed*).
    Only a step has SLURM_STEP_*. A job submitted from inside a step inherits these, but not that step's SLURM_NTASKS.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    same_step = environment.get("SLURM_NTASKS", tasks) == tasks
    return "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and tasks != "1" and same_step


def _of_slurm(environment: Mapping[str, str]) -> RankInfo:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    # Below the ports that systems give out by themselves (from 32768 on), another for each step of a job.
    port = 20000 + (job * 16 + step) % 12000
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])  # 2(x3),1: 2, 2, 2, 1
    repeated = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    per_node = [int(tasks) for tasks, times in repeated for _ in range(int(times or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    return RankInfo(
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        _number(environment, "SLURM_LOCALID"),
        per_node[min(node, len(per_node) - 1)],
        environment.get("MASTER_ADDR") or first_host(nodes),
        _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else port,
        # Newer releases set the second for --cpus-per-task, too: cpu=8.
        "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", ""),
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `n[08-11,20],m1` -> `n08`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first[0])


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}: the launcher sets it")
    return int(text)


def own_gpus(process: RankInfo, num_gpus: int) -> range:
    """Return the GPUs, of those it sees, that a rank has to itself; ValueError if there are fewer than ranks.

    A node's are dealt out to its ranks in equal, consecutive parts: four ranks on eight GPUs own 0-1, 2-3, 4-5, 6-7.
    Each trains on its first and spreads an online verifier over all.
    """
    if process.sees_own_gpus or num_gpus == 1:
        return range(num_gpus)
    rank, ranks = process.local_rank, process.local_world
    if num_gpus < ranks:
        raise ValueError(f"{ranks} ranks were started on a node with {num_gpus} GPUs: start at most one a GPU")
    return range(rank * num_gpus // ranks, (rank + 1) * num_gpus // ranks)
