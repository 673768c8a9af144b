"""Every option of fledge, typed once. `Config` is the root; each group of options is one dataclass.

Values of type `Optional[...] = None` are derived (from the verifier, mostly) and recorded in the manifest of the stage.
"""

# ruff: noqa: F401, I001 (the options are imported from here)
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from .cluster import STAGES, ClusterConfig, ContainerConfig, ContainerKind, Gpu, JobConfig, PlanConfig
from .cluster import ServerConfig, ServerKind, StatusConfig, SubmitConfig
from .data import DataConfig, DumpConfig, DumpEngine, InspectConfig, LastStates, MalformedRows, PreviewConfig
from .data import SELF, SourceConfig, StateDtype, SynthesizeConfig
from .evaluate import CompareConfig, DoctorConfig, DraftSampling, EvaluateConfig, EvaluateEngine, TuneConfig
from .limits import MISSING, Limit, check, require
from .models import AuxNumbering, Device, DraftConfig, Dtype, ExportConfig, ExportFormat, HeadImportConfig
from .models import VerifierConfig
from .train import DeepSpeedConfig, HeadInit, HiddenStates, LayersConfig, OptimizerName, Positions, StoreConfig
from .train import AdaptConfig, TooLong, TrackerName, TrackingConfig, TrainConfig, WandbMode

_IS_FOLDER = Limit(
    "be a plain folder name",
    lambda name: name not in ("", ".", "..") and "/" not in name,
    "; use runs_dir for the place",
)
OF_SELF = ("temperature", "top_p", "max_tokens", "turns", "min_ascii")  # options of a source, as the next
_NOT_OF_SELF = ("subset", "split", "revision", "streaming", "row_function")


@dataclass
class Config:
    """One run: a name, a folder, and the options of every stage."""

    name: Annotated[str, _IS_FOLDER] = MISSING  # name of the run; its folder is runs_dir/name
    runs_dir: str = "runs"  # folder that holds all runs
    overwrite: bool = False  # delete an artifact that was made with other settings, and make it again
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    dump: DumpConfig = field(default_factory=DumpConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    head_import: HeadImportConfig = field(default_factory=HeadImportConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
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
    def heldout_depth(self) -> int:
        """Draft tokens for which held-out acceptance tells the best checkpoint."""
        return self.evaluate.draft_depth or self.train.ttt_steps  # 0 is an evaluation of the verifier alone

    @property
    def trains_lm_head(self) -> bool:
        """Whether the head's lm_head is trained."""
        return self.draft.train_lm_head and not self.train.lora_rank

    @property
    def prompts_folder(self) -> Path:
        return self.run_folder / "prompts"

    @property
    def self_prompts_folder(self) -> Path:
        """Folder of the prompts that the verifier writes, a folder for each source."""
        return self.run_folder / "self_prompts"

    @property
    def conversations_folder(self) -> Path:
        return self.run_folder / "conversations"

    @property
    def hidden_states_folder(self) -> Path:
        return Path(self.dump.folder) if self.dump.folder else self.run_folder / "hidden_states"

    @property
    def training_folder(self) -> Path:
        """Folder of checkpoints and metrics."""
        return self.run_folder / "training"


def validate(config: Config) -> None:
    """Check options against their limits and each other; ValueError names option, requirement, value and cure."""
    check(config)
    _check_parts(config)
    _check_data(config.data)
    _check_conflicts(config)
    _check_window(config)
    _check_packages(config)
    _check_evaluation(config.evaluate)


def _check_parts(config: Config) -> None:
    for group, part, parts in (("synthesize", "shard", "num_shards"), ("dump", "writer", "num_writers")):
        number, count = (getattr(getattr(config, group), name) for name in (part, parts))
        last = f"{group}.{parts} - 1 = {count - 1}"
        require(0 <= number < count, f"{group}.{part} must lie between 0 and {last}, got {number}")
    packs, processes = config.train.packs_per_step, config.train.num_processes
    even = packs % processes == 0
    require(even, f"train.packs_per_step must be a multiple of train.num_processes={processes}, got {packs}")
    gpus, ranks = config.plan.gpus_per_node, config.plan.ranks_per_node
    require(not ranks or gpus % ranks == 0, f"plan.ranks_per_node must divide plan.gpus_per_node={gpus}, got {ranks}")


def _check_data(data: DataConfig) -> None:
    require(
        data.limit is not None or len({source.weight for source in data.sources}) < 2,
        "data.limit is required where sources have different weights: the weights share it out",
    )
    folders = list[str]()
    for number, source in enumerate(data.sources):
        option, is_self = f"data.sources[{number}]", source.path == SELF
        why = "the verifier writes these prompts" if is_self else "it is an option of path=self alone"
        for name in _NOT_OF_SELF if is_self else OF_SELF:
            left_out = f"{option}.{name} must be left out with path={source.path}"
            value = getattr(source, name)
            require(value == getattr(SourceConfig, name), f"{left_out}, got {value}: {why}")
        if not is_self:
            continue
        check(source.name, Annotated[str | None, _IS_FOLDER], f"{option}.name")
        folder = source.name or SELF
        require(folder not in folders, f"{option}.name must differ from that of another source self, got {folder}")
        folders.append(folder)
        require(
            source.limit or data.limit,
            f"{option}.limit is required with path=self: the verifier could write prompts for ever",
        )
    require(
        not folders or data.min_turns <= 1,
        f"data.min_turns must be at most 1 with path=self, whose prompts are one turn, got {data.min_turns}: "
        "the source's own turns asks for later ones",
    )
    for name, low, high in (("chars", data.min_chars, data.max_chars), ("turns", data.min_turns, data.max_turns)):
        least = f"data.max_{name} must be at least data.min_{name}={low}"
        require(high is None or low <= high, f"{least}, or null for no bound, got {high}")


def _check_conflicts(config: Config) -> None:
    fixed = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stream", "n"}
    ours = ", ".join(sorted(fixed & set(config.synthesize.request)))
    require(
        not ours,
        f"synthesize.request must leave {ours} to fledge: synthesize.model, max_tokens, temperature and top_p are "
        "options of their own",
    )
    require(
        not config.verifier.tensor_parallel or config.dump.engine is not DumpEngine.vllm,
        "verifier.tensor_parallel must be false with dump.engine=vllm, which has an option of its own: "
        "dump.vllm_options={tensor_parallel_size: 8}",
    )
    require(
        config.train.dtype is not Dtype.bfloat16 or config.deepspeed.zero_stage > 0,
        "deepspeed.zero_stage must be 1, 2 or 3 with train.dtype=bfloat16, got 0: "
        "DeepSpeed keeps no float32 master weights at stage 0",
    )
    require(
        not config.deepspeed.offload_optimizer or config.deepspeed.zero_stage > 0,
        "deepspeed.zero_stage must be 1, 2 or 3 with deepspeed.offload_optimizer, got 0: DeepSpeed offloads nothing",
    )
    train = config.train
    require(
        train.muon_lr is None or train.optimizer is OptimizerName.muon,
        f"train.optimizer must be muon with train.muon_lr={train.muon_lr}: set it, or muon_lr to null",
    )
    require(
        train.init is HeadInit.random or train.init_from is None,
        f"train.init must be random with train.init_from, got {train.init.name}: the weights are that head's",
    )
    require(
        train.lora_rank is None or train.init_from or config.adapt.head,
        f"train.init_from is required with train.lora_rank={train.lora_rank}: a trained head, which it changes",
    )
    require(
        not train.stores or any(store.weight for store in train.stores),
        "train.stores must have a weight above 0 in one at least: nothing is trained on otherwise",
    )
    require(
        train.max_forgetting is None or (train.init_from and len(train.stores) > 1),
        f"train.init_from and two train.stores or more are required with train.max_forgetting={train.max_forgetting}: "
        "what the head could at its start is measured on the stores after the first",
    )
    require(
        train.init is HeadInit.layers or train.init_layer is None,
        f"train.init must be layers with train.init_layer={train.init_layer}, got {train.init.name}",
    )
    require(
        config.export.push_to is None or config.export.format is not ExportFormat.all,
        "export.format must be plain or speculators with export.push_to, got all: a repository holds one format",
    )


def _check_window(config: Config) -> None:
    """Check that every draft step sees the row that it starts from."""
    require(
        config.draft.window_layers is None or config.draft.sliding_window,
        f"draft.sliding_window is required with draft.window_layers={config.draft.window_layers}: set a window, or "
        "window_layers to null",
    )
    window, of_draft = config.draft.sliding_window, "tree_depth" if config.evaluate.tree_depth else "num_draft_tokens"
    for option, steps in (
        ("train.ttt_steps", config.train.ttt_steps),
        (f"evaluate.{of_draft}", config.evaluate.draft_depth),
    ):
        require(
            window is None or steps <= window,
            f"{option} must be at most draft.sliding_window={window}, so that every step sees a state of the verifier, "
            f"got {steps}",
        )


def _check_packages(config: Config) -> None:
    tracking = config.tracking
    packages = [("tracking.report_to", name.value, name.value, "leave it out") for name in tracking.trackers]
    if tracking.tensorboard:
        packages.insert(0, ("tracking.tensorboard", "tensorboard", "'fledge-eagle[tensorboard]'", "set it to false"))
    for option, package, requirement, cure in packages:
        missing = f"{option} needs the package {package}, which is not installed: "
        require(find_spec(package), f"{missing}pip install {requirement}, or {cure}")


def _check_evaluation(options: EvaluateConfig) -> None:
    """Check how tokens are chosen, who chooses them, and whether the tree has room for them."""
    sampled = options.draft_sampling is DraftSampling.sampled
    by_server = options.engine is EvaluateEngine.server
    require(
        options.temperature or (options.top_p == 1 and options.top_k is None and not sampled),
        "evaluate.temperature must be above 0 with evaluate.top_p, top_k or draft_sampling=sampled: "
        "at 0 nothing is sampled",
    )
    require(  # the reverse is required by `evaluate` alone
        by_server or options.endpoint is None,
        "evaluate.engine must be server with evaluate.endpoint: set it, or leave the endpoint out",
    )
    require(
        by_server or options.num_draft_tokens,
        "evaluate.num_draft_tokens must be at least 1 without evaluate.engine=server: evaluation in this process runs "
        "the verifier alone, too",
    )
    require(
        not (by_server and sampled),
        "evaluate.draft_sampling must be left out with evaluate.engine=server: how drafts are chosen is set where "
        "the server is started",
    )
    if options.tree_depth is None:
        return
    require(not sampled, "evaluate.draft_sampling must be greedy with evaluate.tree_depth: trees are not drawn")
    depth, branches, nodes = options.tree_depth, options.tree_top_k, options.num_draft_tokens
    largest = branches + (depth - 1) * branches**2
    require(
        depth <= nodes <= largest,
        f"evaluate.num_draft_tokens must lie between {depth} and {largest}, the nodes of a tree of "
        f"evaluate.tree_depth={depth} and tree_top_k={branches}, got {nodes}; 60 is usual",
    )
