"""Training of the draft head, and where metrics go."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from .limits import (
    MISSING,
    Kernels,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    between,
)
from .models import Dtype

# Where training takes the verifier's states from: the store of `fledge dump`, or the verifier, run next to the trainer
# on every batch, while the store holds tokens only.
HiddenStates = Enum("HiddenStates", {"offline": "offline", "online": "online"})
# A training sample longer than train.batch_tokens ends after its last answer that ends within (or is dropped without
# one), or is dropped.
TooLong = Enum("TooLong", {"cut": "cut", "drop": "drop"})
# Positions whose next token is learned: those of answers; or all, prompts and templates too.
Positions = Enum("Positions", {"answers": "answers", "all": "all"})
# The optimizer of the head: AdamW; or Muon for the matrices of its layers and fc, and AdamW for all else.
OptimizerName = Enum("OptimizerName", {"adamw": "adamw", "muon": "muon"})
# Where a new head starts, next to lm_head: from random numbers; with the verifier's final norm; as its layers too; by
# regression of the verifier's states.
HeadInit = Enum("HeadInit", {"random": "random", "norm": "norm", "layers": "layers", "regression": "regression"})
# Where W&B records go: its servers, a local folder, nowhere.
WandbMode = Enum("WandbMode", {"online": "online", "offline": "offline", "disabled": "disabled"})


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


_TOO_SMALL = ": its range is too small for the head"
_WIDE = Limit("be float32 or bfloat16", lambda dtype: dtype is not Dtype.float16, cure=_TOO_SMALL)
_PAIR = Limit("be two numbers", lambda betas: len(betas) == 2)


@dataclass
class StoreConfig:
    """One of several hidden-state stores that are trained on together."""

    folder: str = MISSING  # folder of a hidden-state store
    # how often each of its samples is seen in an epoch; 0.5: one half, then the other; 0: only its held-out ones count
    weight: NonNegativeFloat = 1.0
    limit: PositiveInt | None = None  # most samples of it that are trained on; a higher limit has these, too


@dataclass
class TrainConfig:
    """Optimisation of the draft head."""

    # offline: read the store; online: run the verifier on every batch, and `dump` writes tokens only
    hidden_states: HiddenStates = HiddenStates.offline
    ttt_steps: PositiveInt = 7  # draft steps that are unrolled (training-time test)
    gamma: Share = 0.8  # step k has the weight gamma^k in the loss
    loss: str = "kl"  # loss to minimise, an entry of train/loss/losses.py
    # of losses that blend: KL has the share exp(-blend_rate * running acceptance)
    blend_rate: Annotated[float, between(0.0, 100.0)] = 3.0
    triton: Kernels = "auto"  # attention by Triton kernels on a GPU; auto: if they agree there with plain PyTorch
    checkpoint_activations: bool = False  # recompute each draft step in the backward pass: less memory, more time
    stores: list[StoreConfig] = field(default_factory=list)  # stores to train on; empty: the run's own
    too_long: TooLong = TooLong.cut  # samples longer than batch_tokens: cut after the last answer that fits, or drop
    # positions whose next token is learned: of answers; all: of prompts too, which needs dump.last_states=all
    positions: Positions = Positions.answers
    epochs: PositiveInt = 10  # passes over the training samples
    max_steps: PositiveInt | None = None  # optimizer steps; overrides epochs
    batch_tokens: PositiveInt = 4096  # tokens of a pack, which is the micro-batch of one rank
    packs_per_step: PositiveInt = 8  # packs of an optimizer step over all processes; each accumulates its share
    # folder of a head to start from, a checkpoint or an import; null: a new head, by init
    init_from: str | None = None
    # how a new head begins, next to an lm_head of the verifier's: random; norm: with the verifier's final norm; layers:
    # with that, with layers of the verifier, and with an fc that hands them one aux state; regression: fitted to the
    # verifier's states of the first packs before the first step, with attention that finds what followed before
    init: HeadInit = HeadInit.random
    # rank of the low-rank changes (LoRA) of fc and of the layers' matrices, which alone are trained, from the head at
    # init_from, and merged into each checkpoint; null: all weights are trained
    lora_rank: PositiveInt | None = None
    init_layer: NonNegativeInt | None = None  # the verifier's layer that the head's first one starts as; null: the last
    # adamw; muon: by Muon the matrices of the layers and fc, by AdamW lm_head, norms and biases
    optimizer: OptimizerName = OptimizerName.adamw
    lr: PositiveFloat = 1e-4  # peak learning rate
    # peak learning rate of what Muon trains, whose updates are as large as AdamW's at the same rate; null: as lr
    muon_lr: PositiveFloat | None = None
    min_lr_share: Share = 0.1  # share of lr that remains at the end of the cosine
    warmup_share: Share = 0.02  # share of all steps with linear warm-up
    betas: Annotated[list[float], _PAIR] = field(default_factory=lambda: [0.9, 0.95])  # Adam's two coefficients
    weight_decay: float = 0.0  # weight decay of AdamW and Muon
    max_grad_norm: float = 0.5  # norm to which gradients are clipped
    dtype: Annotated[Dtype, _WIDE] = Dtype.bfloat16  # type of weights and activations; master weights are float32
    seed: int = 0  # seed of initialisation and order
    log_every: PositiveInt = 10  # steps between log records
    heldout_every: PositiveInt = 200  # steps between measurements of held-out acceptance length
    heldout_samples: PositiveInt = 256  # most held-out conversations of each store it is measured on
    save_every: PositiveInt = 500  # steps between checkpoints
    keep_checkpoints: PositiveInt = 2  # newest checkpoints that stay, next to the best
    # checkpoints in a row that are no better than the best, until training ends; null: it makes all its steps
    patience: PositiveInt | None = None
    # with init_from and several stores: acceptance length that held-out conversations of the stores after the first may
    # lose. The best checkpoint is the first store's within that, and one that loses more ends training; null: no bound
    max_forgetting: NonNegativeFloat | None = None
    max_skipped_steps: PositiveInt = 5  # steps in a row with a gradient that is not finite before training stops
    data_workers: NonNegativeInt = 2  # processes of a rank that read packs; 0: the rank reads them itself
    # training processes of `fledge run`, or per node of `fledge submit`; else the launcher decides
    num_processes: PositiveInt = 1
    collective_timeout_s: PositiveInt = 1800  # seconds that a rank may keep the others waiting before the run ends
    verify_checksums: bool = True  # read every shard once before the first step, and compare checksums


@dataclass
class LayersConfig:
    """How `fledge layers` chooses the aux layers."""

    candidates: list[int] | None = None  # 0-based layers of the verifier to choose from; null: all
    size: PositiveInt = 3  # layers of a set
    num_sets: PositiveInt = 4  # sets that are trained, next to the default one
    # most conversations whose states of all candidates are recorded to train on, and of those held out
    conversations: PositiveInt = 400
    steps: PositiveInt = 200  # optimizer steps of each set


@dataclass
class AdaptConfig:
    """What `fledge adapt` starts from, and when it ends."""

    # the head: a run, a checkpoint or an export of it, or a published head's folder or hub id
    head: str | None = None
    # stores of what it must go on to do; trained on by their weights, 0 measures only
    replay: list[StoreConfig] = field(default_factory=list)
    max_forgetting: NonNegativeFloat | None = 0.05  # train.max_forgetting on the stores of replay; null: no floor
    patience: PositiveInt = 3  # train.patience


@dataclass
class DeepSpeedConfig:
    """DeepSpeed options; its own configuration is derived from these and `train`."""

    zero_stage: Annotated[int, between(0, 3)] = 2  # ZeRO stage: what is sharded over ranks
    offload_optimizer: bool = False  # keep optimizer states on the CPU and make the step there


@dataclass
class TrackingConfig:
    """Where metrics go besides the run's own files; docs/reference/metrics.md says what those of training mean."""

    # trackers that get the metrics; each but wandb needs the package of its name
    report_to: list[TrackerName] = field(default_factory=lambda: [TrackerName.wandb])
    wandb: WandbMode = WandbMode.offline  # where W&B records go: its servers, a local folder, or nowhere
    project: str = "fledge"  # project in the trackers
    entity: str | None = None  # team or user of W&B
    tensorboard: bool = False  # write event files to training/tensorboard, as if report_to named it

    @property
    def trackers(self) -> list[TrackerName]:
        """Trackers that are used, each once."""
        names = [*self.report_to, *([TrackerName.tensorboard] if self.tensorboard else [])]
        if self.wandb is WandbMode.disabled:
            names = [name for name in names if name is not TrackerName.wandb]
        return list(dict.fromkeys(names))
