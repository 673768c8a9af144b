"""Training of the draft head, and where metrics go."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from .limits import MISSING, Kernels, Limit, NonNegativeInt, PositiveFloat, PositiveInt, Share, between
from .models import Dtype

# Where training takes the verifier's states from: the store of `fledge dump`, or the verifier, run next to the trainer
# on every batch, while the store holds tokens only.
HiddenStates = Enum("HiddenStates", {"offline": "offline", "online": "online"})
# A training sample longer than train.batch_tokens ends after its last answer that ends within (or is dropped without
# one), or is dropped.
TooLong = Enum("TooLong", {"cut": "cut", "drop": "drop"})
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

    folder: str = MISSING
    weight: PositiveFloat = 1.0  # times each of its training samples is seen in an epoch: 0.5 a half, then the other


@dataclass
class TrainConfig:
    """Optimisation of the draft head."""

    hidden_states: HiddenStates = HiddenStates.offline  # online: no disk, a verifier forward a batch; for `dump` too
    ttt_steps: PositiveInt = 7  # draft steps unrolled (training-time test)
    gamma: Share = 0.8  # step k weighs gamma^k in the loss
    loss: str = "kl"  # what is minimised, one of train/loss/losses.py
    # of losses that blend: KL has the share exp(-blend_rate * running acceptance)
    blend_rate: Annotated[float, between(0.0, 100.0)] = 3.0
    triton: Kernels = "auto"  # attention by Triton kernels, on a GPU; auto: if they agree there with plain PyTorch
    checkpoint_activations: bool = False  # recompute each draft step in the backward pass: less memory, more time
    stores: list[StoreConfig] = field(default_factory=list)  # all that are trained on; none: the run's own
    too_long: TooLong = TooLong.cut  # training samples longer than batch_tokens
    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None  # optimizer steps; overrides epochs
    batch_tokens: PositiveInt = 4096  # tokens of a pack, the micro-batch of one rank
    packs_per_step: PositiveInt = 8  # packs of an optimizer step, over all processes: each accumulates its share
    init_from: str | None = None  # folder of a head (checkpoint or import) to start from; None: from the verifier
    lr: PositiveFloat = 1e-4
    min_lr_share: Share = 0.1  # of lr, reached at the last step of the cosine
    warmup_share: Share = 0.02  # of all steps, linear
    betas: Annotated[list[float], _PAIR] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    dtype: Annotated[Dtype, _WIDE] = Dtype.bfloat16  # with float32 master weights
    seed: int = 0
    log_every: PositiveInt = 10  # steps
    heldout_every: PositiveInt = 200  # steps between measurements of held-out acceptance length
    heldout_samples: PositiveInt = 256  # held-out conversations it is measured on, at most
    save_every: PositiveInt = 500  # steps between checkpoints
    keep_checkpoints: PositiveInt = 2  # the newest that stay, next to the best
    max_skipped_steps: PositiveInt = 5  # in a row, for gradients that are not finite; then training stops
    data_workers: NonNegativeInt = 2  # processes a rank reads packed batches with; 0: it reads them itself
    num_processes: PositiveInt = 1  # of `fledge run`, and of `fledge submit` on each node; else the launcher decides
    collective_timeout_s: PositiveInt = 1800  # a rank that lets the others wait longer ends the run
    verify_checksums: bool = True  # read every shard once before the first step


@dataclass
class DeepSpeedConfig:
    """DeepSpeed options; its own configuration is derived from these and `train`."""

    zero_stage: Annotated[int, between(0, 3)] = 2
    offload_optimizer: bool = False  # optimizer states and step on the CPU


@dataclass
class TrackingConfig:
    """Where metrics go besides the run's own files; docs/reference/metrics.md says what those of training mean."""

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
