"""The verifier, the draft head, and the heads that are written and read."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from .limits import MISSING, Limit, at_least, between

# Floating-point formats, named as in torch.
Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"})
# Where a model runs; auto takes one GPU, several if one does not hold it, or the CPU if there is none.
Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"})
# Checkpoints that `fledge export` writes: plain is read by vLLM, SGLang and TensorRT-LLM, speculators by vLLM.
ExportFormat = Enum("ExportFormat", {"plain": "plain", "speculators": "speculators", "all": "all"})
# What a layer id k in a foreign head's config.json means: the output of layer k, or (vllm) of layer k-1.
AuxNumbering = Enum("AuxNumbering", {"zero_based": "zero_based", "vllm": "vllm"})

Size = Annotated[int, at_least(1, cure="; null takes the verifier's")]


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HubId = Annotated[str, Limit("be a hub id, ORG/NAME", lambda name: _HUB_ID.fullmatch(name))]


def _different_layers(cure: str = "") -> Limit:
    return Limit(
        "be different layers, at least one, counted from 0",
        lambda layers: layers and len(set(layers)) == len(layers) and min(layers) >= 0,
        cure,
    )


@dataclass
class VerifierConfig:
    """The frozen model whose output is preserved."""

    path: str = MISSING  # local folder, hub id, or `embedded` for the small verifier that comes with fledge
    revision: str | None = None  # branch, tag or commit on the hub
    adapter: str | None = None  # folder or hub id of a PEFT (LoRA) adapter, which is merged into it at first use
    merged_dir: str = "runs/merged"  # where verifiers with adapters are merged; runs_dir/merged unless it is given
    dtype: Dtype = Dtype.bfloat16  # type of computation, and of weights that are not quantised
    # where the verifier runs; auto: one GPU, several if one cannot hold it, the CPU if there is none
    device: Device = Device.auto
    tensor_parallel: bool = False  # split the verifier over torchrun's ranks, by transformers' plan for it
    # variables of the chat template, such as {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # sizes of its config.json, so that `fledge plan` works without the hub
    shapes: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, str | None]:
        """Return what a manifest says of where it comes from."""
        return {"verifier_path": self.path, "verifier_revision": self.revision, "verifier_adapter": self.adapter}


@dataclass
class DraftConfig:
    """The draft head to train; null takes the verifier's value."""

    # 0-based decoder layers whose outputs the head reads; null: 1, L/2-1 and L-4 of L layers
    aux_layers: Annotated[list[int], _different_layers("; null takes the default ones")] | None = None
    # tokens the head can propose, the most frequent ones; null: the verifier's whole vocabulary
    vocab_size: Size | None = 32000
    num_layers: Annotated[int, between(1, 8)] = 1  # decoder layers of the head
    # width of the head; other than the verifier's, the head trains an embedding of its own
    hidden_size: Size | None = None
    # width of the head's MLP; null: the verifier's, or that of the experts one token meets
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None  # attention heads; null: the verifier's, or as many as the width holds
    num_key_value_heads: Size | None = None  # heads of keys and values; null: the verifier's
    head_dim: Size | None = None  # size of an attention head; null: the verifier's
    fc_norm: bool = True  # EAGLE-3.1: one RMSNorm for each aux state before fc
    norm_output: bool = True  # EAGLE-3.1: the state that is fed onward is the normed one
    # the first layer's residual is the normed state; SGLang and TensorRT-LLM ignore it
    norm_before_residual: bool = False
    norm_before_fc: bool = False  # one RMSNorm over all aux states before fc, as Speculators' heads have it
    attention_bias: bool = False  # biases of q_proj, k_proj, v_proj and o_proj
    qk_norm: bool = False  # RMSNorms of queries and keys, as in Qwen3; only vLLM serves them
    # positions a layer sees, its own included; null: all up to its own
    sliding_window: Annotated[int, at_least(16, cure="; null: no window")] | None = None
    # layers of the head with the window, 0-based; null: all, if there is a window
    window_layers: Annotated[list[int], _different_layers("; null takes all")] | None = None
    train_lm_head: bool = True  # train the head's lm_head; false: keep the verifier's rows, times its logit scale


@dataclass
class ExportConfig:
    """The checkpoint that engines serve."""

    # checkpoint to write; vLLM, SGLang and TensorRT-LLM read plain, vLLM reads speculators
    format: ExportFormat = ExportFormat.plain
    dtype: Dtype = Dtype.bfloat16  # type of the weights that are written
    # write the head's lm_head; false: engines take the verifier's, which must be the same (draft.train_lm_head=false)
    lm_head: bool = True
    checkpoint: str | None = None  # `best`, `latest` or the folder of a head; null: the best checkpoint of the run
    # positions that every layer of the exported head sees, its own included; null: as it was trained
    sliding_window: Annotated[int, at_least(16, cure="; null: as it was trained")] | None = None
    push_to: HubId | None = None  # upload the export to this hub id, ORG/NAME; the token is read from HF_TOKEN
    private: bool = False  # a repository that push_to creates is private
    base_model: HubId | None = None  # the verifier's hub id for card and commands, if verifier.path is a folder


@dataclass
class HeadImportConfig:
    """A head made elsewhere, for `fledge import` and `fledge doctor`."""

    source: str | None = None  # folder of a published head (config.json and weights), or its hub id, ORG/HEAD
    revision: str | None = None  # branch, tag or commit of source on the hub
    # numbering of the layer ids in its config.json; only if the file leaves it open
    aux_numbering: AuxNumbering | None = None
    # 0-based layers the head reads; only if its config.json names none
    aux_layers: Annotated[list[int], _different_layers()] | None = None
    # q and k were trained with neighbouring dimensions rotated as pairs; import reorders them
    interleaved_rotary: bool = False
