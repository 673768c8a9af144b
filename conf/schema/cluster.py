"""Jobs of Slurm, and what is known of them before and after."""

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Annotated

from .limits import Limit, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare

STAGES = ("synthesize", "dump", "train", "evaluate", "export")

# How jobs enter their container: not at all, by srun --container-image=..., or by srun apptainer exec ...
ContainerKind = Enum("ContainerKind", {"none": "none", "pyxis": "pyxis", "apptainer": "apptainer"})
# What serves the verifier while a job array asks it; none: it runs in the tasks of the array; custom: server.command.
ServerKind = Enum(
    "ServerKind", {"none": "none", "vllm": "vllm", "sglang": "sglang", "trtllm": "trtllm", "custom": "custom"}
)
# A kind of GPU, for `fledge plan`; slurm/plan/plan.py has their memory.
Gpu = Enum("Gpu", {"a100": "a100", "h100": "h100", "h200": "h200", "b200": "b200"})

_GPU_REQUEST = Limit("be gpus-per-node or gres", lambda option: option in ("gpus-per-node", "gres"))
_SOME_STAGES = Limit(f"name some of {', '.join(STAGES)}", lambda stages: stages and set(stages) <= set(STAGES))


@dataclass
class JobConfig:
    """What Slurm is asked for, for the jobs of one stage."""

    partition: str | None = None  # Slurm partition; null: cluster.partition
    tasks: PositiveInt = 1  # tasks of the job array: servers, or parts of synthesize and dump
    at_once: PositiveInt | None = None  # most tasks that run at a time; null: all that find room
    nodes: PositiveInt = 1  # nodes of one job; more than one for training only
    gpus: NonNegativeInt = 0  # GPUs on each node
    cpus: PositiveInt = 4  # CPU cores on each node
    memory_gib: NonNegativeInt | None = None  # memory on each node; 0: all of it; null: what the partition gives
    hours: PositiveFloat = 24.0  # time limit; a stage that reaches it is saved and goes on in another start


@dataclass
class DumpJobConfig(JobConfig):
    """The jobs that record hidden states."""

    processes: PositiveInt = 1  # of a job, which share out its GPUs: each has a copy of the verifier


@dataclass
class ServerConfig(JobConfig):
    """The servers of the verifier, one a job of the array."""

    # server that runs the verifier; none: the tasks run it themselves; custom: command
    kind: ServerKind = ServerKind.none
    command: list[str] = field(default_factory=list)  # command of kind custom; {port} and {model} are replaced
    tensor_parallel: PositiveInt | None = None  # GPUs of one copy of the verifier; null: all GPUs of the job
    max_length: int | None = 8192  # tokens of prompt and answer; null: the verifier's own context
    options: list[str] = field(default_factory=list)  # further arguments of the server, such as [--quantization, fp8]
    ready_s: int = 3600  # seconds that tasks wait for a server to answer /health
    venv: str | None = None  # virtual environment of the server; null: cluster.venv
    image: str | None = None  # container image of the server; null: cluster.container.image
    env: dict[str, str] = field(default_factory=dict)  # environment variables of the server, next to cluster.env


@dataclass
class ContainerConfig:
    """A container that every stage runs in."""

    kind: ContainerKind = ContainerKind.none  # how jobs enter a container: not at all, by pyxis, or by apptainer
    image: str | None = None  # container image
    # further mounts FROM:TO; docs/guide/slurm.md lists what is mounted anyway
    mounts: list[str] = field(default_factory=list)


@dataclass
class ClusterConfig:
    """How `fledge submit` asks Slurm for jobs. Values of env and scratch may name variables of the job, as $USER."""

    partition: str | None = None  # Slurm partition; null: the cluster's default
    account: str | None = None  # Slurm account; null: the cluster's default
    qos: str | None = None  # Slurm quality of service; null: the cluster's default
    gpu_request: Annotated[str, _GPU_REQUEST] = "gpus-per-node"  # option of sbatch that asks for GPUs
    gpu_type: str | None = None  # kind of GPU to ask for, such as h100
    # seconds before its time limit at which a job saves; longer than a shard or checkpoint takes
    warn_s: PositiveInt = 300
    max_restarts: PositiveInt = 3  # starts in a row without progress after which a job fails
    address: str | None = None  # address under which other nodes reach a service of this one; null: its host name
    container: ContainerConfig = field(default_factory=ContainerConfig)
    modules: list[str] = field(default_factory=list)  # environment modules to load
    venv: str | None = None  # folder of the virtual environment with fledge's dependencies
    setup: list[str] = field(default_factory=list)  # shell lines to run before a stage
    python: str = "python"  # Python that runs the stages
    scratch: str | None = None  # TMPDIR of the jobs, on a disk that every node has; may name variables such as $USER
    # environment variables of the jobs; values may name variables such as $USER
    env: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)  # further options of every job, such as --constraint=ib
    srun: list[str] = field(default_factory=list)  # further options of every step, such as --mpi=none
    server: ServerConfig = field(default_factory=ServerConfig)
    synthesize: JobConfig = field(default_factory=JobConfig)
    dump: DumpJobConfig = field(default_factory=DumpJobConfig)
    train: JobConfig = field(default_factory=JobConfig)
    evaluate: JobConfig = field(default_factory=JobConfig)
    export: JobConfig = field(default_factory=JobConfig)


@dataclass
class SubmitConfig:
    """What `fledge submit` does."""

    dry_run: bool = False  # print the job files and submit nothing
    # stages to submit, in order
    stages: Annotated[list[str], _SOME_STAGES] = field(default_factory=lambda: list(STAGES))


_RATES = Limit(
    "be shares between 0 and 1, none above the one before, at least one",
    lambda rates: rates and rates[0] <= 1 and rates[-1] >= 0 and all(a >= b for a, b in pairwise(rates)),
)


@dataclass
class PlanConfig:
    """What `fledge plan` counts with if the run has no artifacts yet."""

    verifier_config: str | None = None  # path of a config.json; null: the verifier's folder, verifier.shapes or the hub
    conversations: PositiveInt | None = None  # number of conversations; null: those of the run, else data.limit
    mean_tokens: PositiveFloat = 1000.0  # mean tokens of a conversation, prompts and answers
    counted_share: PositiveShare = 0.6  # share of these tokens that the verifier writes
    gpu: Gpu = Gpu.h100  # kind of GPU
    gpu_memory_gib: PositiveFloat | None = None  # memory of one GPU; null: that of its kind
    num_nodes: PositiveInt = 1  # nodes that train
    gpus_per_node: PositiveInt = 8  # GPUs of a node
    # training ranks of a node; null: one per GPU; an online verifier uses the rank's share of GPUs
    ranks_per_node: PositiveInt | None = None
    disk_tb: PositiveFloat | None = None  # free disk for the run, in 10^12 bytes; null: that of the disk with runs_dir
    # hoped-for share of rounds that accept draft token 1, 2, ...; with it the plan has a vLLM command that serves the
    # verifier as fast as a head with these rates would make it, and writes the config.json of such a head; null: none
    acceptance_rates: Annotated[list[float], _RATES] | None = None
    json: bool = False  # print JSON instead of the table
    save: bool = False  # write plan.json to the run folder, too

    @property
    def ranks_of_node(self) -> int:
        """Ranks of training on each node."""
        return self.ranks_per_node or self.gpus_per_node


@dataclass
class StatusConfig:
    """What `fledge status RUN` shows."""

    run: str | None = None  # run folder; null: that of `name`
    lines: int = 6  # log lines to show of each job that runs or failed
