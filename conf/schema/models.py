"""The verifier, the draft head, and the heads that are written and read."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from .limits import MISSING, Limit, PositiveInt, at_least

# Floating-point formats, named as in torch.
Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"})
# Where a model runs; auto takes one GPU, several if one does not hold it, or the CPU if there is none.
Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"})
# Checkpoints that `fledge export` writes: plain is read by vLLM, SGLang and TensorRT-LLM, speculators by vLLM.
ExportFormat = Enum("ExportFormat", {"plain": "plain", "speculators": "speculators", "all": "all"})
# What a layer id k in a foreign head's config.json means: the output of layer k, or (vllm) of layer k-1.
AuxNumbering = Enum("AuxNumbering", {"zero_based": "zero_based", "vllm": "vllm"})

Size = Annotated[int, at_least(1, cure="; null takes the verifier's")]


def _different_layers(cure: str = "") -> Limit:
    return Limit(
        "be different layers, at least one, counted from 0",
        lambda layers: layers and len(set(layers)) == len(layers) and min(layers) >= 0,
        cure,
    )


@dataclass
class VerifierConfig:
    """The frozen model whose output is preserved."""

    path: str = MISSING  # local folder, hub id, or "embedded" for the small verifier in this package
    revision: str | None = None  # hub branch, tag or commit
    dtype: Dtype = Dtype.bfloat16  # of what is computed, and of weights that are not quantised
    device: Device = Device.auto
    tensor_parallel: bool = False  # torchrun's ranks hold one verifier together, by transformers' plan for it
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. {enable_thinking: false}
    shapes: dict[str, Any] = field(default_factory=dict)  # its config.json's sizes, for `fledge plan` without the hub


@dataclass
class DraftConfig:
    """The draft head to train; None takes the verifier's value."""

    # 0-based decoder layers whose outputs are fed; None: 1, L/2-1, L-4
    aux_layers: Annotated[list[int], _different_layers("; null takes the default ones")] | None = None
    vocab_size: Size | None = 32000  # draft vocabulary; None: the verifier's, in full
    num_layers: PositiveInt = 1
    hidden_size: Size | None = None  # another than the verifier's gives the head an embedding of its own, trained
    intermediate_size: Size | None = None  # None: models/head/config.py says what is taken; so do plan and train
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    fc_norm: bool = True  # EAGLE-3.1: one RMSNorm per aux state before fc
    norm_output: bool = True  # EAGLE-3.1: the state fed onward is the normed one
    norm_before_residual: bool = False  # the residual of the first layer is the normed state
    train_lm_head: bool = True  # false keeps the verifier's rows (times its logit scale); vocab_size=null: all of them


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
    aux_numbering: AuxNumbering | None = None  # only if its config.json leaves it open, and then asked for
    aux_layers: Annotated[list[int], _different_layers()] | None = None  # as above; only if its config.json names none
    interleaved_rotary: bool = False  # q and k were trained with pairs of neighbours rotated: import reorders them
