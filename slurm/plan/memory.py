"""What training keeps in memory, by component and by phase of a step, from the shapes alone.

N parameters in items of b bytes, R ranks, T rows of a pack, n of them useful, K steps; U = 4 N is one float32 copy.
Each component below says what it is; the sum of those that live at the same time is a phase, the largest phase the
peak. Tested against the resident size of real steps on the CPU (tests/slurm); what a GPU has of its
own (its norms keep less, DeepSpeed's buckets are allocated whole, products in 16 bit give float32) is read from code.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from ...conf.schema import DeepSpeedConfig, TrainConfig
from ...models.head.architectures import build_head
from ...models.head.config import DraftHeadConfig
from ...models.head.lora import choose_trained, num_parameters
from ...models.head.vocabulary import VocabularyMap
from ...train.loss.fused import SLICE_BYTES, rows_in_chunk

BUCKET = 500_000_000  # elements of DeepSpeed's reduce_bucket_size, which fledge leaves as it is
_WIDE = 4  # bytes of softmaxes, sums, master weights and moments


@dataclass(frozen=True)
class TrainingShape:
    """Everything that the memory of one rank depends on."""

    head: DraftHeadConfig
    train: TrainConfig
    deepspeed: DeepSpeedConfig
    counted_share: float  # useful rows among all
    ranks: int
    train_lm_head: bool = True
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.train.dtype.value)

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def narrow(self) -> bool:
        """Whether training is in 16 bit."""
        return self.item < _WIDE

    @property
    def useful(self) -> int:
        """Useful rows of a pack."""
        return round(self.train.batch_tokens * self.counted_share)

    @property
    def micro_batches(self) -> int:
        """Packs that a rank has in memory at a time: those of an optimizer step."""
        return -(-self.train.packs_per_step // self.ranks)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """All parameters of the head, and those that are trained."""
        head = self.head
        with torch.device("meta"):
            ids = torch.zeros(head.draft_vocab_size, dtype=torch.int64)
            model = build_head(head, VocabularyMap(ids, torch.zeros(head.vocab_size, dtype=torch.bool)))
            choose_trained(model, self.train_lm_head, self.train.lora_rank, self.train.seed)
        return num_parameters(model)

    def bucket(self, elements: int) -> int:
        """Return the elements of DeepSpeed's bucket for a number of gradients: on a GPU it is allocated whole."""
        return BUCKET if self.device == "cuda" else min(BUCKET, elements)


def training_memory(shape: TrainingShape) -> dict[str, dict[str, int]]:
    """Return bytes by phase and component.

    Of `forward` (unroll and loss), `backward` and `update` what lives then, each with all that lives throughout.
    """
    always = _always(shape)
    unroll = always | _accumulated(shape) | {"activations of the unroll": _activations(shape)}
    return {
        "forward": unroll | _loss_gradients(shape) | _loss(shape),
        "backward": unroll | _loss_gradients(shape) | _backward(shape),
        "update": always | {"gradients and Adam's step": _update(shape)},
    }


def peak(phases: dict[str, dict[str, int]]) -> tuple[str, int]:
    """Return the phase that needs most, and its bytes."""
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    return max(sums.items(), key=lambda phase: phase[1])


def _always(shape: TrainingShape) -> dict[str, int]:
    """Return what a rank keeps from the first step to the last."""
    (every, trained), head, stage = shape.parameters, shape.head, shape.deepspeed.zero_stage
    share = trained * _WIDE // (shape.ranks if stage else 1)
    on_device = not shape.deepspeed.offload_optimizer
    gradients = trained * _WIDE if stage == 1 and shape.narrow else 0  # float32 buffers that are held all the time
    if stage == 3 and on_device:
        gradients = share
    batch = shape.train.batch_tokens * (len(head.aux_layers) + 1) * head.verifier_hidden_size * shape.item
    return {
        "weights of the head": every * shape.item // (shape.ranks if stage == 3 else 1),
        "float32 master weights": on_device * bool(stage) * share,
        "Adam's two moments": on_device * (2 * trained * _WIDE // (shape.ranks if stage else 1)),
        "gradients of all packs, float32": gradients,
        "DeepSpeed's bucket (ZeRO 3)": shape.bucket(trained) * _WIDE if stage == 3 else 0,
        "verifier's embedding and lm_head": 2 * head.vocab_size * head.verifier_hidden_size * shape.item,
        "packed batches": shape.micro_batches * batch,
    }


def _accumulated(shape: TrainingShape) -> dict[str, int]:
    """Return the gradients of packs before, while a further one is computed, and the weights that ZeRO 3 gathers."""
    (every, trained), stage = shape.parameters, shape.deepspeed.zero_stage
    gradients = trained * shape.item
    if stage == 2:
        gradients = 0 if shape.deepspeed.offload_optimizer else trained * _WIDE // shape.ranks
    return {
        "gradients of the packs before": 0 if shape.micro_batches == 1 or stage == 3 else gradients,
        "weights gathered (ZeRO 3)": every * shape.item if stage == 3 and shape.ranks > 1 else 0,
    }


def _norm(shape: TrainingShape) -> int:
    """Return what a norm keeps of an element of its input: torch's fused one, on GPUs, the input alone."""
    return shape.item if shape.device == "cuda" else 2 * _WIDE


def _activations(shape: TrainingShape) -> int:
    """Return what autograd keeps of the unroll.

    Of all T rows: the aux states normed and laid next to each other, the fused state and the embedding with their
    norms, and keys and values of step 0. Of the useful ones at every step: the norms' inputs and outputs, queries, the
    attention's output, keys and values, and three tensors of the SwiGLU. With activation checkpointing a step keeps its
    inputs and its keys and values, and one step at a time is there in full.
    """
    head, item, rows, useful = shape.head, shape.item, shape.train.batch_tokens, shape.useful
    steps = shape.train.ttt_steps
    on_cpu, width = shape.device == "cpu", head.hidden_size
    norm = _norm(shape)
    queries, keys = head.num_attention_heads * head.head_dim, head.num_key_value_heads * head.head_dim
    aux = len(head.aux_layers) * head.verifier_hidden_size
    of_aux = _WIDE * (1 + shape.narrow) if on_cpu else 0  # the input itself is the batch's
    fused = aux * (of_aux + item) * (head.fc_norm + head.norm_before_fc)
    of_keys = 2 * keys * item + keys * norm * head.qk_norm
    every_row = rows * (fused + 2 * width * (norm + item) + of_keys)
    tail = width * (2 * norm + item) + 3 * head.intermediate_size * item + queries * (2 * item + norm * head.qk_norm)
    further = (tail + width * item + of_keys) * (head.num_layers - 1)
    first = useful * (tail + width * item) + (rows if head.num_layers > 1 else useful) * further
    later = useful * (width * (norm + item) + of_keys + tail + further)
    projected = rows * (queries + 2 * keys) * item
    normed = steps * useful * width * item
    if not shape.train.checkpoint_activations:
        return every_row + first + (steps - 1) * later + projected + normed
    inputs = useful * (width + queries + 2 * keys * (1 + head.num_layers) + 2 * head.head_dim) * item
    return every_row + steps * inputs + max(first, later) + projected + normed


def _loss_gradients(shape: TrainingShape) -> dict[str, int]:
    """Return the gradients that the pass over the logits leaves to the backward pass."""
    head = shape.head
    matrix = head.draft_vocab_size * head.hidden_size * _WIDE if shape.train_lm_head else 0
    states = shape.train.ttt_steps * shape.useful * head.hidden_size * shape.item
    return {"gradient of lm_head, float32": matrix, "gradients of the states": states}


def _loss(shape: TrainingShape) -> dict[str, int]:
    """Return what the pass over the logits needs (train/loss/fused.py): a chunk of all K steps, and what it makes.

    The gradient of lm_head is added up in float32; in 16 bit products are made before they are added, slice by slice.
    """
    head, useful, steps = shape.head, shape.useful, shape.train.ttt_steps
    vocab, trained_width = head.draft_vocab_size, head.hidden_size * shape.train_lm_head
    size = rows_in_chunk(steps, vocab, shape.dtype, torch.device(shape.device), trained_width)
    size = min(size, max(1, useful))
    chunk = vocab * (size * steps * (_WIDE + shape.item * shape.narrow) + 2 * (size + steps - 1) * _WIDE)
    if not shape.narrow:  # a gather of the window; in 16 bit not next to the rounded rows
        chunk += size * vocab * _WIDE
    chunk += 2 * size * steps * head.hidden_size * _WIDE
    product = min(vocab * head.hidden_size * _WIDE, SLICE_BYTES)
    rows = vocab * head.verifier_hidden_size * shape.item if vocab < head.vocab_size else 0
    return {
        "product added to it": product if shape.narrow and shape.train_lm_head else 0,
        "chunk of logits": chunk,
        "targets, and lm_head's rows of the draft vocabulary": useful * head.verifier_hidden_size * shape.item + rows,
    }


def _backward(shape: TrainingShape) -> dict[str, int]:
    """Return what the backward pass has of its own: a gradient as it is handed on, and where it is sent from."""
    head, (_, trained) = shape.head, shape.parameters
    matrix = head.draft_vocab_size * head.hidden_size if shape.train_lm_head else 0
    has_bucket = shape.deepspeed.zero_stage == 2 or (shape.deepspeed.zero_stage == 1 and not shape.narrow)
    return {
        "gradient of lm_head, in the weights' type": matrix * shape.item * shape.narrow,
        "DeepSpeed's bucket": shape.bucket(trained // 2) * shape.item * has_bucket,
    }


def _update(shape: TrainingShape) -> int:
    """Return what the optimizer's step adds: gradients, the flat copy of a rank's share, and Adam's denominator."""
    _, trained = shape.parameters
    if shape.deepspeed.offload_optimizer:
        return trained * shape.item
    if shape.deepspeed.zero_stage == 0:
        return 2 * trained * _WIDE
    if shape.deepspeed.zero_stage == 1 and shape.narrow:
        return trained * shape.item + 2 * trained * _WIDE // shape.ranks
    return 3 * trained * _WIDE // shape.ranks
