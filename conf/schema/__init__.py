"""Every option of fledge, typed once. `Config` is the root; each group of options is one dataclass.

Values of type `Optional[...] = None` are derived (from the verifier, mostly) and recorded in the manifest of the stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING: Any = "???"  # how OmegaConf writes a value that has to be given; not imported, so that benchmarks run without


class Dtype(Enum):
    """A floating-point format, named as in torch."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class WandbMode(Enum):
    """Where W&B records go: its servers, a local folder, nowhere."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


class TrackerName(Enum):
    """A tracker of accelerate.tracking; each but wandb is a package of that name to install."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"
    mlflow = "mlflow"
    swanlab = "swanlab"
    comet_ml = "comet_ml"
    aim = "aim"
    clearml = "clearml"
    dvclive = "dvclive"


class ExportFormat(Enum):
    """Checkpoint format written by `fledge export`."""

    plain = "plain"  # vLLM, SGLang, TensorRT-LLM
    speculators = "speculators"  # vLLM
    all = "all"


class AuxNumbering(Enum):
    """What a layer id k in a foreign head's config.json means: the output of layer k, or of layer k-1."""

    zero_based = "zero_based"
    vllm = "vllm"


class Device(Enum):
    """Where a model runs; auto takes one GPU, several if one does not hold it, or the CPU if there is none."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DumpEngine(Enum):
    """What runs the verifier when its hidden states are recorded."""

    transformers = "transformers"  # in this process
    vllm = "vllm"  # vLLM's hidden-state extraction, in a process of dump.vllm_python


class EvaluateEngine(Enum):
    """What answers the questions of `evaluate`."""

    transformers = "transformers"  # in this process
    server = "server"  # a running vLLM or SGLang that serves verifier and head, at evaluate.endpoint


class Gpu(Enum):
    """A kind of GPU, for `fledge plan`; slurm/plan/plan.py has their memory."""

    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


class DraftSampling(Enum):
    """How a draft head chooses its tokens where the verifier samples."""

    greedy = "greedy"  # the likeliest, as SGLang, TensorRT-LLM and vLLM by default do
    sampled = "sampled"  # drawn at the same temperature, as vLLM's draft_sample_method=probabilistic does; chains only


class StateDtype(Enum):
    """A format that hidden states are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float8 = "float8_e4m3fn"  # with a float32 scale for every token and layer


class LastStates(Enum):
    """Which positions' last hidden states are stored."""

    all = "all"
    counted = "counted"  # those whose distribution training can ask for: inside answers


class HiddenStates(Enum):
    """Where training takes the verifier's hidden states from."""

    offline = "offline"  # the store that `fledge dump` wrote
    online = "online"  # the verifier, run beside the trainer on every batch; the store holds tokens only


class TTTLoss(Enum):
    """What training minimises; train/loss/fused.py defines each."""

    kl = "kl"  # KL(verifier || draft)
    reverse_kl = "reverse_kl"  # KL(draft || verifier)
    total_variation = "total_variation"  # 1 - probability of acceptance
    lk_alpha = "lk_alpha"  # - log probability of acceptance
    lk_lambda = "lk_lambda"  # KL, and 1 - probability of acceptance the more of it there is
    acceptance_length = "acceptance_length"  # KL, and - expected number of accepted tokens


class MalformedRows(Enum):
    """What becomes of a row of a prompt source that is no usable prompt."""

    stop = "stop"  # it is named, and nothing is made
    skip = "skip"  # it is left out and counted


class TooLong(Enum):
    """What becomes of a training sample longer than `train.batch_tokens`."""

    cut = "cut"  # it ends after its last answer that ends within; without one it is dropped
    drop = "drop"


class ContainerKind(Enum):
    """How jobs enter their container."""

    none = "none"  # they run on the node itself
    pyxis = "pyxis"  # srun --container-image=...
    apptainer = "apptainer"  # srun apptainer exec ...


class ServerKind(Enum):
    """What serves the verifier while a job array asks it."""

    none = "none"  # nothing: the verifier runs in the tasks of the array
    vllm = "vllm"
    sglang = "sglang"
    trtllm = "trtllm"
    custom = "custom"  # cluster.server.command


@dataclass
class VerifierConfig:
    """The frozen model whose output is preserved."""

    path: str = MISSING  # local folder, hub id, or "embedded" for the small verifier in this package
    revision: str | None = None  # hub branch, tag or commit
    dtype: Dtype = Dtype.bfloat16  # of what is computed, and of weights that are not quantised
    device: Device = Device.auto
    tensor_parallel: bool = (
        False  # torchrun's ranks hold one verifier together, by the plan that transformers has for it
    )
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. {enable_thinking: false}
    shapes: dict[str, Any] = field(default_factory=dict)  # its config.json's sizes, for `fledge plan` without the hub


@dataclass
class DraftConfig:
    """The draft head to train; None takes the verifier's value."""

    aux_layers: list[int] | None = None  # 0-based decoder layers whose outputs are fed; None: 1, L/2-1, L-4
    vocab_size: int | None = 32000  # draft vocabulary; None: the verifier's, in full
    num_layers: int = 1
    hidden_size: int | None = None  # another than the verifier's gives the head an embedding of its own, trained
    intermediate_size: int | None = None  # None: models/head/sizes.py says what is taken; so do plan and train
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    fc_norm: bool = True  # EAGLE-3.1: one RMSNorm per aux state before fc
    norm_output: bool = True  # EAGLE-3.1: the state fed onward is the normed one
    norm_before_residual: bool = False  # the residual of the first layer is the normed state
    train_lm_head: bool = True  # false keeps the verifier's rows (times its logit scale); vocab_size=null: all of them


@dataclass
class SourceConfig:
    """One source of prompts."""

    path: str = MISSING  # hub id, local JSON/JSONL/Parquet file or folder, or "embedded"
    name: str | None = None  # first part of each id; None: the last part of path
    subset: str | None = None  # of a hub dataset that has several ("configuration" there)
    split: str = "train"
    revision: str | None = None
    streaming: bool = False  # read it as it arrives instead of storing it first; a limit then takes what comes first
    limit: int | None = None  # prompts taken at most, chosen by data.seed; None: all
    weight: float = 1.0  # share of data.limit, relative to the other sources


@dataclass
class DataConfig:
    """Prompts the verifier answers."""

    sources: list[SourceConfig] = field(default_factory=list)
    limit: int | None = None  # prompts of all sources together, shared out by their weights; None: all
    heldout_share: float = 0.02  # share of conversations, chosen by id, answered greedily and never trained on
    seed: int = 0  # of what limits choose, and of the order
    exclude: list[str] = field(default_factory=list)  # evaluation questions, id:subset too: no prompts like them
    deduplicate: bool = True  # of prompts that say the same, only one is taken
    min_chars: int = 1  # characters of the user's side, all turns together
    max_chars: int | None = None
    min_turns: int = 1  # user turns
    max_turns: int | None = None
    malformed_rows: MalformedRows = MalformedRows.stop
    local_images: bool = False  # data of the hub may name files here as images, and any data hosts of this network


@dataclass
class SynthesizeConfig:
    """How the verifier answers."""

    max_tokens: int = 1024  # tokens an answer
    temperature: float = 0.7  # 0 is greedy; held-out conversations are always greedy
    top_p: float = 1.0
    batch_size: int = 64  # conversations generated together in this process
    seed: int = 0  # of answers sampled in this process; servers have their own
    endpoints: list[str] = field(default_factory=list)  # http://HOST:PORT/v1 of servers; none: the verifier runs here
    servers: str | None = None  # or a folder in which servers write theirs, NAME.healthy: those of `fledge submit`
    model: str | None = None  # what the servers call the verifier, with evaluate.engine=server too; None: verifier.path
    request: dict[str, Any] = field(default_factory=dict)  # further fields of every request, in the server's words
    concurrency: int = 256  # requests in flight at one endpoint, at most: fewer where it pushes back
    request_timeout_s: float = 600.0
    retries: int = 8  # of one request that failed in a way that may pass, with growing pauses
    max_attempts: int = 3  # starts in which a failed conversation is tried
    server_wait_s: float = 600.0  # how long no endpoint may answer, once one has, before the stage stops
    grace_s: float = 60.0  # for what is in flight when a signal asks to stop
    shard: int = 0  # answer prompts shard, shard + num_shards, ... only: one task of a job array
    num_shards: int = 1

    @property
    def by_servers(self) -> bool:
        """Whether servers answer, and not the verifier in this process."""
        return bool(self.endpoints or self.servers)


@dataclass
class DumpConfig:
    """How hidden states are recorded."""

    folder: str | None = None  # where the store goes; None: hidden_states in the run folder
    engine: DumpEngine = DumpEngine.transformers
    dtype: StateDtype | None = None  # that states are stored in; None: verifier.dtype
    last_states: LastStates = LastStates.all
    max_length: int = 4096  # tokens of a sample; answers that end beyond are left out and counted
    max_images: int = 5  # conversations with more are left out and counted; 0: all that have any
    keep_truncated: bool = False  # train on answers cut by synthesize.max_tokens too
    batch_tokens: int = 8192  # tokens (padding included) of one verifier forward, in online training too
    shard_tokens: int = 100_000  # a shard is closed at the sample that reaches this; three of them are held in memory
    writer: int = 0  # write shards writer, writer + num_writers, ... only: one task of a job array (torchrun: one rank)
    num_writers: int = 1
    token_workers: int | None = None  # processes that tokenise; 0: this one; None: one a core where there is much to do
    vllm_python: str | None = None  # Python of the environment that has vLLM; None: this one
    vllm_options: dict[str, Any] = field(default_factory=dict)  # of vLLM's LLM, such as {tensor_parallel_size: 8}


@dataclass
class StoreConfig:
    """One of several hidden-state stores that are trained on together."""

    folder: str = MISSING
    weight: float = 1.0  # times each of its training samples is seen in an epoch: 0.5 takes a half, then the other


@dataclass
class TrainConfig:
    """Optimisation of the draft head."""

    hidden_states: HiddenStates = HiddenStates.offline  # online: no disk, a verifier forward a batch; for `dump` too
    ttt_steps: int = 7  # draft steps unrolled (training-time test)
    gamma: float = 0.8  # step k weighs gamma^k in the loss
    loss: TTTLoss = TTTLoss.kl
    blend_rate: float = 3.0  # lk_lambda, acceptance_length: KL has the share exp(-blend_rate * running acceptance)
    triton: bool | str = "auto"  # attention by Triton kernels, on a GPU; auto: if they agree there with plain PyTorch
    checkpoint_activations: bool = False  # recompute each draft step in the backward pass: less memory, more time
    stores: list[StoreConfig] = field(default_factory=list)  # all that are trained on; none: the run's own
    too_long: TooLong = TooLong.cut  # training samples longer than batch_tokens
    epochs: int = 10
    max_steps: int | None = None  # optimizer steps; overrides epochs
    batch_tokens: int = 4096  # tokens of a pack, the micro-batch of one rank
    packs_per_step: int = 8  # packs of an optimizer step, over all processes: each accumulates its share of them
    init_from: str | None = None  # folder of a head (checkpoint or import) to start from; None: from the verifier
    lr: float = 1e-4
    min_lr_share: float = 0.1  # of lr, reached at the last step of the cosine
    warmup_share: float = 0.02  # of all steps, linear
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    dtype: Dtype = Dtype.bfloat16  # with float32 master weights
    seed: int = 0
    log_every: int = 10  # steps
    heldout_every: int = 200  # steps between measurements of held-out acceptance length
    heldout_samples: int = 256  # held-out conversations it is measured on, at most
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # the newest that stay, beside the best
    max_skipped_steps: int = 5  # in a row, for gradients that are not finite; then training stops
    data_workers: int = 2  # processes a rank reads packed batches with; 0: it reads them itself
    num_processes: int = 1  # that `fledge run` starts, and `fledge submit` on each node; elsewhere the launcher decides
    collective_timeout_s: int = 1800  # a rank that lets the others wait longer ends the run
    verify_checksums: bool = True  # read every shard once before the first step


@dataclass
class DeepSpeedConfig:
    """DeepSpeed options; its own configuration is derived from these and `train`."""

    zero_stage: int = 2
    offload_optimizer: bool = False  # optimizer states and step on the CPU


@dataclass
class EvaluateConfig:
    """Measurement of acceptance length by decoding."""

    questions: str | None = None  # hub id, file or folder in a form of eval/questions.py, or "embedded"
    questions_subset: str | None = None  # of a hub dataset that has several: main (gsm8k), 3.0.0 (cnn_dailymail)
    questions_split: str = "train"
    engine: EvaluateEngine = EvaluateEngine.transformers
    endpoint: str | None = None  # base URL of the server, as http://localhost:8000/v1, with engine=server
    num_draft_tokens: int = 3  # tokens proposed a round
    tree_depth: int | None = None  # None: a chain; else an EAGLE-2 dynamic tree of num_draft_tokens nodes, this deep
    tree_top_k: int = 8  # branches: children a node may have, and nodes that grow at each depth
    max_tokens: int = 1024  # tokens an answer
    temperature: float = 0.0  # 0 is greedy; above, tokens are sampled, and drafts leave their distribution as it is
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int | None = None  # sample among this many of the likeliest tokens; None: all
    draft_sampling: DraftSampling = DraftSampling.greedy
    seed: int = 0  # of the samples, with the question and the turn
    batch_size: int = 1  # questions answered at a time
    kernels: bool | str = "auto"  # fused Triton kernels, on a GPU; auto: each that agrees there with plain PyTorch
    cuda_graphs: bool = True  # on a GPU: a round is captured once and replayed
    questions_per_category: int | None = None  # None: all
    heldout_prompts: int = 64  # held-out conversations decoded too, to compare with what training walked; 0: none
    baselines: bool = True  # measure an untrained head and prompt-lookup drafting beside
    checkpoint: str | None = None  # "best", "latest" or the folder of a head; None: the best checkpoint of the run

    @property
    def lacks_server(self) -> bool:
        """Whether a server is to answer, and none is named."""
        return self.engine is EvaluateEngine.server and self.endpoint is None

    @property
    def draft_depth(self) -> int:
        """Draft tokens that a round can accept."""
        return self.tree_depth or self.num_draft_tokens


@dataclass
class ExportConfig:
    """The checkpoint that engines serve."""

    format: ExportFormat = ExportFormat.plain
    dtype: Dtype = Dtype.bfloat16
    checkpoint: str | None = None  # "best", "latest" or the folder of a head; None: the best checkpoint of the run


@dataclass
class HeadImportConfig:
    """A head made elsewhere, for `fledge import` and `fledge doctor`."""

    source: str | None = None  # its folder: config.json and weights, as published
    aux_numbering: AuxNumbering | None = None  # only where its config.json leaves it open, and then asked for
    aux_layers: list[int] | None = None  # 0-based; only where its config.json names no layers, and then asked for
    interleaved_rotary: bool = False  # q and k were trained with pairs of neighbours rotated: import reorders them


@dataclass
class DoctorConfig:
    """How `fledge doctor` measures what the head at head_import.source was trained for."""

    measure: bool = True  # run the verifier; false reads the files only
    num_prompts: int = 16  # answered by the verifier, of evaluate.questions or the embedded ones
    max_tokens: int = 64  # tokens an answer


@dataclass
class PreviewConfig:
    """What `fledge preview` shows."""

    id: str | None = None  # of a conversation; None: the first


@dataclass
class InspectConfig:
    """What `fledge inspect STORE` shows of a hidden-state store."""

    store: str | None = None  # its folder; None: the run's own
    verify: bool = False  # read everything: compare every checksum, look for states that are not finite
    sample: str | None = None  # id of the sample that is shown as text; None: the first


@dataclass
class CompareConfig:
    """What `fledge compare RUN...` lays side by side."""

    runs: list[str] = field(default_factory=list)  # a run's folder, its name in runs_dir, or an evaluation's folder
    published: bool = True  # rows of the published figures of NVIDIA's Maverick head
    folder: str | None = None  # where compare.md and compare.png go; None: the tables are printed only


@dataclass
class PlanConfig:
    """What `fledge plan` counts with where the run has no artifacts yet."""

    verifier_config: str | None = None  # path of a config.json; None: the verifier's folder, verifier.shapes or the hub
    conversations: int | None = None  # None: those of the run, else data.limit
    mean_tokens: float = 1000.0  # a conversation, prompts and answers
    counted_share: float = 0.6  # of its tokens, those that the verifier writes
    gpu: Gpu = Gpu.h100
    gpu_memory_gib: float | None = None  # of one GPU; None: its kind's
    num_nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None  # of training; None: one a GPU; online, a rank's verifier takes its share of them
    disk_tb: float | None = None  # free space for the run, in 10^12 bytes; None: of the disk that runs_dir is on
    json: bool = False  # print JSON instead of the table
    save: bool = False  # write plan.json to the run folder too


@dataclass
class TrackingConfig:
    """Where metrics go besides the run's own files; train/metrics/tracking.py has the table of training's."""

    report_to: list[TrackerName] = field(default_factory=lambda: [TrackerName.wandb])
    wandb: WandbMode = WandbMode.offline  # disabled: as if report_to did not name it
    project: str = "fledge"
    entity: str | None = None  # of W&B
    tensorboard: bool = False  # as if report_to named it: event files in training/tensorboard, by [tensorboard]

    @property
    def trackers(self) -> list[TrackerName]:
        """Trackers that are used, each once."""
        names = [*self.report_to, *([TrackerName.tensorboard] if self.tensorboard else [])]
        if self.wandb is WandbMode.disabled:
            names = [name for name in names if name is not TrackerName.wandb]
        return list(dict.fromkeys(names))


@dataclass
class JobConfig:
    """What Slurm is asked for, for the jobs of one stage."""

    partition: str | None = None  # None: cluster.partition
    tasks: int = 1  # of a job array: servers, or parts that synthesize and dump are done in
    at_once: int | None = None  # tasks of the array that run at a time; None: as many as there is room for
    nodes: int = 1  # of one job; more than one for training only
    gpus: int = 0  # on each node
    cpus: int = 4  # on each node
    memory_gib: int | None = None  # on each node; 0: all there is, None: what the partition gives
    hours: float = 24.0  # time limit; a stage that reaches it is saved and goes on in another start


@dataclass
class ServerConfig(JobConfig):
    """The servers of the verifier, one a job of the array."""

    kind: ServerKind = ServerKind.none
    command: list[str] = field(default_factory=list)  # kind custom; {port} and {model} stand for what they say
    tensor_parallel: int | None = None  # GPUs that share one copy; None: all of the job
    max_length: int | None = 8192  # tokens of prompt and answer; None: the verifier's own context
    options: list[str] = field(default_factory=list)  # further arguments, such as [--quantization, fp8]
    ready_s: int = 3600  # how long the array waits for a server that answers /health
    venv: str | None = None  # None: cluster.venv
    image: str | None = None  # None: cluster.container.image
    env: dict[str, str] = field(default_factory=dict)  # beside cluster.env


@dataclass
class ContainerConfig:
    """A container that every stage runs in."""

    kind: ContainerKind = ContainerKind.none
    image: str | None = None
    mounts: list[str] = field(default_factory=list)  # FROM:TO, beside what docs/slurm.md says is mounted anyway


@dataclass
class ClusterConfig:
    """How `fledge submit` asks Slurm for jobs. Values of env and scratch may name variables of the job, as $USER."""

    partition: str | None = None  # None: the cluster's default, as with account and qos
    account: str | None = None
    qos: str | None = None
    gpu_request: str = "gpus-per-node"  # the option of sbatch that asks for GPUs: gpus-per-node, or gres
    gpu_type: str | None = None  # such as h100
    warn_s: int = 300  # before its time limit a job is told to save: more than a dump's shard or a checkpoint takes
    max_restarts: int = 3  # starts in a row that bring no progress; then the job fails
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
    stages: list[str] = field(default_factory=lambda: ["synthesize", "dump", "train", "evaluate", "export"])


@dataclass
class StatusConfig:
    """What `fledge status RUN` shows."""

    run: str | None = None  # its folder; None: that of `name`
    lines: int = 6  # of the log of each job that runs or failed


@dataclass
class Config:
    """One run: a name, a folder, and the options of every stage."""

    name: str = MISSING  # the run folder is runs_dir/name
    runs_dir: str = "runs"
    overwrite: bool = False  # make an artifact anew when it was made with other settings
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    dump: DumpConfig = field(default_factory=DumpConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    head_import: HeadImportConfig = field(default_factory=HeadImportConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    status: StatusConfig = field(default_factory=StatusConfig)

    @property
    def run_folder(self) -> Path:
        """Folder that holds every artifact of the run."""
        return Path(self.runs_dir) / self.name

    @property
    def prompts_folder(self) -> Path:
        """Folder of the prepared prompts."""
        return self.run_folder / "prompts"

    @property
    def conversations_folder(self) -> Path:
        """Folder of the regenerated conversations."""
        return self.run_folder / "conversations"

    @property
    def hidden_states_folder(self) -> Path:
        """Folder of the hidden-state store."""
        return Path(self.dump.folder) if self.dump.folder else self.run_folder / "hidden_states"

    @property
    def training_folder(self) -> Path:
        """Folder of checkpoints and metrics."""
        return self.run_folder / "training"


def validate(config: Config) -> None:
    """Check values against their ranges and against each other.

    Raises:
        ValueError: names the option, what is required and what was given.
    """
    at_least_one = {
        "draft.num_layers": config.draft.num_layers,
        "dump.max_length": config.dump.max_length,
        "dump.batch_tokens": config.dump.batch_tokens,
        "dump.shard_tokens": config.dump.shard_tokens,
        "train.ttt_steps": config.train.ttt_steps,
        "train.epochs": config.train.epochs,
        "train.batch_tokens": config.train.batch_tokens,
        "train.packs_per_step": config.train.packs_per_step,
        "train.log_every": config.train.log_every,
        "train.heldout_every": config.train.heldout_every,
        "train.heldout_samples": config.train.heldout_samples,
        "train.save_every": config.train.save_every,
        "train.keep_checkpoints": config.train.keep_checkpoints,
        "train.max_skipped_steps": config.train.max_skipped_steps,
        "train.num_processes": config.train.num_processes,
        "train.collective_timeout_s": config.train.collective_timeout_s,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, kernels in {"train.triton": config.train.triton, "evaluate.kernels": config.evaluate.kernels}.items():
        if kernels not in (True, False, "auto"):
            raise ValueError(f"{name} must be auto, true or false, got {kernels!r}")
    _validate_data(config.data)
    _validate_synthesize(config.synthesize)
    _validate_dump(config)
    _validate_evaluate(config.evaluate)
    _validate_plan(config.plan)
    if config.train.data_workers < 0:
        raise ValueError(f"train.data_workers must be at least 0, got {config.train.data_workers}")
    for number, store in enumerate(config.train.stores):
        if not 0 < store.weight < math.inf:
            raise ValueError(f"train.stores[{number}].weight must be above 0 and finite, got {store.weight}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in sizes:
        value = getattr(config.draft, name)
        if value is not None and value < 1:
            raise ValueError(f"draft.{name} must be at least 1, got {value}; null takes the verifier's")
    for name in ("num_prompts", "max_tokens"):
        if (value := getattr(config.doctor, name)) < 4:
            raise ValueError(f"doctor.{name} must be at least 4 to measure anything, got {value}")
    bounds = {
        "data.heldout_share": (config.data.heldout_share, 0.0, 0.9),
        "synthesize.top_p": (config.synthesize.top_p, 0.0, 1.0),
        "synthesize.temperature": (config.synthesize.temperature, 0.0, 10.0),
        "train.gamma": (config.train.gamma, 0.0, 1.0),
        "train.blend_rate": (config.train.blend_rate, 0.0, 100.0),
        "train.warmup_share": (config.train.warmup_share, 0.0, 1.0),
        "train.min_lr_share": (config.train.min_lr_share, 0.0, 1.0),
        "deepspeed.zero_stage": (config.deepspeed.zero_stage, 0, 3),
    }
    for name, (bounded, low, high) in bounds.items():
        if not low <= bounded <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, got {bounded}")
    if config.train.packs_per_step % config.train.num_processes:
        raise ValueError(
            f"train.packs_per_step must be a multiple of train.num_processes={config.train.num_processes}, "
            f"got {config.train.packs_per_step}"
        )
    if len(config.train.betas) != 2:
        raise ValueError(f"train.betas must be two numbers, got {config.train.betas}")
    if config.train.max_steps is not None and config.train.max_steps < 1:
        raise ValueError(f"train.max_steps must be at least 1, got {config.train.max_steps}")
    if config.draft.aux_layers == []:
        raise ValueError("draft.aux_layers must name at least one layer, got []; null takes the default ones")
    for name, layers in (("draft", config.draft.aux_layers), ("head_import", config.head_import.aux_layers)):
        if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            raise ValueError(f"{name}.aux_layers must be different layers, counted from 0, got {layers}")
    if config.tracking.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tracking.tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'fledge[tensorboard]', or set it to false"
        )
    for tracker in config.tracking.trackers:
        if find_spec(tracker.value) is None:
            raise ValueError(
                f"tracking.report_to needs the package {tracker.value}, which is not installed: "
                f"pip install {tracker.value}, or leave it out"
            )
    if config.train.lr <= 0:
        raise ValueError(f"train.lr must be above 0, got {config.train.lr}")
    if "/" in config.name or config.name in ("", ".", ".."):
        raise ValueError(f"name must be a plain folder name, got {config.name!r}; use runs_dir for the place")
    if config.train.dtype is Dtype.bfloat16 and config.deepspeed.zero_stage == 0:
        raise ValueError(
            "deepspeed.zero_stage must be 1, 2 or 3 with train.dtype=bfloat16, got 0: "
            "DeepSpeed keeps no float32 master weights at stage 0"
        )
    if config.train.dtype is Dtype.float16:
        raise ValueError("train.dtype must be float32 or bfloat16, got float16: its range is too small for the head")


def _validate_dump(config: Config) -> None:
    options = config.dump
    if not 0 <= options.writer < options.num_writers:
        raise ValueError(
            f"dump.writer must lie between 0 and dump.num_writers - 1 = {options.num_writers - 1}, got {options.writer}"
        )
    if options.max_images < 0:
        raise ValueError(f"dump.max_images must be at least 0, got {options.max_images}")
    if options.token_workers is not None and options.token_workers < 0:
        raise ValueError(f"dump.token_workers must be at least 0, got {options.token_workers}")
    if config.verifier.tensor_parallel and options.engine is DumpEngine.vllm:
        raise ValueError(
            "verifier.tensor_parallel must be false with dump.engine=vllm, which has an option of its own: "
            "dump.vllm_options={tensor_parallel_size: 8}"
        )


def _validate_evaluate(options: EvaluateConfig) -> None:
    for name in ("num_draft_tokens", "tree_depth", "tree_top_k", "max_tokens", "top_k", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"evaluate.{name} must be at least 1, got {value}")
    if not 0 <= options.temperature <= 10:
        raise ValueError(f"evaluate.temperature must lie between 0.0 and 10.0, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"evaluate.top_p must be above 0 and at most 1, got {options.top_p}")
    sampled = options.draft_sampling is DraftSampling.sampled
    if not options.temperature and (options.top_p < 1 or options.top_k is not None or sampled):
        raise ValueError(
            "evaluate.temperature must be above 0 with evaluate.top_p, top_k or draft_sampling=sampled: "
            "at 0 nothing is sampled"
        )
    _validate_evaluate_engine(options)
    if options.tree_depth is None:
        return
    if sampled:
        raise ValueError("evaluate.draft_sampling must be greedy with evaluate.tree_depth: trees are not drawn")
    largest = options.tree_top_k + (options.tree_depth - 1) * options.tree_top_k**2
    if not options.tree_depth <= options.num_draft_tokens <= largest:
        raise ValueError(
            f"evaluate.num_draft_tokens must lie between {options.tree_depth} and {largest}, the nodes of a tree of "
            f"evaluate.tree_depth={options.tree_depth} and tree_top_k={options.tree_top_k}, got "
            f"{options.num_draft_tokens}; 60 is usual"
        )


def _validate_evaluate_engine(options: EvaluateConfig) -> None:
    if options.engine is not EvaluateEngine.server:
        if options.endpoint is not None:
            raise ValueError("evaluate.engine must be server with evaluate.endpoint: set it, or leave the endpoint out")
        return
    if options.endpoint is not None:  # evaluate requires it, and says so; other commands do not
        _validate_url("evaluate.endpoint must be a base URL", options.endpoint)
    if options.draft_sampling is DraftSampling.sampled:
        raise ValueError(
            "evaluate.draft_sampling must be left out with evaluate.engine=server: how drafts are chosen is set where "
            "the server is started"
        )


def _validate_plan(options: PlanConfig) -> None:
    for name in ("num_nodes", "gpus_per_node"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"plan.{name} must be at least 1, got {value}")
    if options.ranks_per_node is not None and (
        options.ranks_per_node < 1 or options.gpus_per_node % options.ranks_per_node
    ):
        raise ValueError(
            f"plan.ranks_per_node must divide plan.gpus_per_node={options.gpus_per_node}, got {options.ranks_per_node}"
        )
    for name in ("conversations", "mean_tokens", "gpu_memory_gib", "disk_tb"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"plan.{name} must be above 0 and finite, got {value}")
    if not 0 < options.counted_share <= 1:
        raise ValueError(f"plan.counted_share must be above 0 and at most 1, got {options.counted_share}")


def _validate_data(data: DataConfig) -> None:
    for number, source in enumerate(data.sources):
        if not 0 < source.weight < math.inf:
            raise ValueError(f"data.sources[{number}].weight must be above 0 and finite, got {source.weight}")
        if source.limit is not None and source.limit < 1:
            raise ValueError(f"data.sources[{number}].limit must be at least 1, or null for all, got {source.limit}")
    if data.limit is not None and data.limit < 1:
        raise ValueError(f"data.limit must be at least 1, or null for all, got {data.limit}")
    if data.limit is None and len({source.weight for source in data.sources}) > 1:
        raise ValueError("data.limit is required where sources have different weights: the weights share it out")
    for of in ("chars", "turns"):
        low, high = (getattr(data, f"{bound}_{of}") for bound in ("min", "max"))
        if low < 0:
            raise ValueError(f"data.min_{of} must be at least 0, got {low}")
        if high is not None and high < low:
            raise ValueError(f"data.max_{of} must be at least data.min_{of}={low}, or null for no bound, got {high}")


def _validate_url(must: str, url: str) -> None:
    if not url.startswith(("http://", "https://")) or "@" in url:
        raise ValueError(
            f"{must} such as http://localhost:8000/v1, without a key (read from OPENAI_API_KEY), "
            f"got {url.rpartition('@')[2]}"
        )


def _validate_synthesize(options: SynthesizeConfig) -> None:
    for name in ("max_tokens", "batch_size", "concurrency", "max_attempts", "num_shards"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"synthesize.{name} must be at least 1, got {value}")
    for name in ("retries", "grace_s", "server_wait_s"):
        if not 0 <= (value := getattr(options, name)) < math.inf:
            raise ValueError(f"synthesize.{name} must be at least 0 and finite, got {value}")
    if not 0 < options.request_timeout_s < math.inf:
        raise ValueError(f"synthesize.request_timeout_s must be above 0 and finite, got {options.request_timeout_s}")
    if not 0 <= options.shard < options.num_shards:
        raise ValueError(
            f"synthesize.shard must lie between 0 and synthesize.num_shards - 1 = {options.num_shards - 1}, "
            f"got {options.shard}"
        )
    for url in options.endpoints:
        _validate_url("synthesize.endpoints must be base URLs", url)
    if len(set(options.endpoints)) < len(options.endpoints):
        raise ValueError("synthesize.endpoints must name each server once")
    fixed = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stream", "n"}
    if ours := fixed & set(options.request):
        raise ValueError(
            f"synthesize.request must leave {', '.join(sorted(ours))} to fledge: synthesize.model, max_tokens, "
            "temperature and top_p are options of their own"
        )
