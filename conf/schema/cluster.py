"""Jobs of Slurm, and what is known of them before and after."""

from dataclasses import dataclass, field
from enum import Enum
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

    partition: str | None = None  # None: cluster.partition
    tasks: PositiveInt = 1  # of a job array: servers, or parts that synthesize and dump are done in
    at_once: PositiveInt | None = None  # tasks of the array that run at a time; None: as many as there is room for
    nodes: PositiveInt = 1  # of one job; more than one for training only
    gpus: NonNegativeInt = 0  # on each node
    cpus: PositiveInt = 4  # on each node
    memory_gib: NonNegativeInt | None = None  # on each node; 0: all there is, None: what the partition gives
    hours: PositiveFloat = 24.0  # time limit; a stage that reaches it is saved and goes on in another start


@dataclass
class ServerConfig(JobConfig):
    """The servers of the verifier, one a job of the array."""

    kind: ServerKind = ServerKind.none
    command: list[str] = field(default_factory=list)  # kind custom; {port} and {model} stand for what they say
    tensor_parallel: PositiveInt | None = None  # GPUs that share one copy; None: all of the job
    max_length: int | None = 8192  # tokens of prompt and answer; None: the verifier's own context
    options: list[str] = field(default_factory=list)  # further arguments, such as [--quantization, fp8]
    ready_s: int = 3600  # how long the array waits for a server that answers /health
    venv: str | None = None  # None: cluster.venv
    image: str | None = None  # None: cluster.container.image
    env: dict[str, str] = field(default_factory=dict)  # next to cluster.env


@dataclass
class ContainerConfig:
    """A container that every stage runs in."""

    kind: ContainerKind = ContainerKind.none
    image: str | None = None
    mounts: list[str] = field(default_factory=list)  # FROM:TO, next to what docs/slurm.md says is mounted anyway


@dataclass
class ClusterConfig:
    """How `fledge submit` asks Slurm for jobs. Values of env and scratch may name variables of the job, as $USER."""

    partition: str | None = None  # None: the cluster's default, as with account and qos
    account: str | None = None
    qos: str | None = None
    gpu_request: Annotated[str, _GPU_REQUEST] = "gpus-per-node"  # sbatch's option for GPUs: gpus-per-node, or gres
    gpu_type: str | None = None  # such as h100
    warn_s: PositiveInt = 300  # before its time limit a job saves: more than a dump's shard or a checkpoint takes
    max_restarts: PositiveInt = 3  # starts in a row that bring no progress; then the job fails
    address: str | None = None  # under which other nodes reach services of one; None: its host name
    container: ContainerConfig = field(default_factory=ContainerConfig)
    modules: list[str] = field(default_factory=list)  # module load ...
    venv: str | None = None  # folder of the virtual environment that has fledge's dependencies
    setup: list[str] = field(default_factory=list)  # further shell lines before a stage, verbatim
    python: str = "python"
    scratch: str | None = None  # TMPDIR of the jobs: a node's own disk, there on every node
    env: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)  # further options of every job, such as --constraint=ib
    srun: list[str] = field(default_factory=list)  # further options of every step, such as --mpi=none
    server: ServerConfig = field(default_factory=ServerConfig)
    synthesize: JobConfig = field(default_factory=JobConfig)
    dump: JobConfig = field(default_factory=JobConfig)
    train: JobConfig = field(default_factory=JobConfig)
    evaluate: JobConfig = field(default_factory=JobConfig)
    export: JobConfig = field(default_factory=JobConfig)


@dataclass
class SubmitConfig:
    """What `fledge submit` does."""

    dry_run: bool = False  # print the job files and submit nothing
    stages: Annotated[list[str], _SOME_STAGES] = field(default_factory=lambda: list(STAGES))


@dataclass
class PlanConfig:
    """What `fledge plan` counts with if the run has no artifacts yet."""

    verifier_config: str | None = None  # path of a config.json; None: the verifier's folder, verifier.shapes or the hub
    conversations: PositiveInt | None = None  # None: those of the run, else data.limit
    mean_tokens: PositiveFloat = 1000.0  # a conversation, prompts and answers
    counted_share: PositiveShare = 0.6  # of its tokens, those that the verifier writes
    gpu: Gpu = Gpu.h100
    gpu_memory_gib: PositiveFloat | None = None  # of one GPU; None: its kind's
    num_nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    ranks_per_node: PositiveInt | None = None  # of training; None: one a GPU; a rank's online verifier has its share
    disk_tb: PositiveFloat | None = None  # free space for the run, in 10^12 bytes; None: of the disk that has runs_dir
    json: bool = False  # print JSON instead of the table
    save: bool = False  # write plan.json to the run folder too

    @property
    def ranks_of_node(self) -> int:
        """Ranks of training on each node."""
        return self.ranks_per_node or self.gpus_per_node


@dataclass
class StatusConfig:
    """What `fledge status RUN` shows."""

    run: str | None = None  # its folder; None: that of `name`
    lines: int = 6  # of the log of each job that runs or failed
