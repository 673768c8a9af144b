"""Heads in the Speculators format, which vLLM serves by itself: the checkpoint names its verifier."""

from pathlib import Path
from typing import Any

import torch

from ..head.architectures import architecture_of
from ..head.draft_head import DraftHead
from .fields import AUX_IDS, LAYER, TOP, vllm_layer_ids, written_fields
from .plain import dtype_name, head_tensors, write_head_files

SPECULATORS_VERSION = "0.5.0"  # the release of the library whose form this is, for readers only


def save_speculators(
    folder: Path,
    head: DraftHead,
    record: dict[str, Any],
    dtype: torch.dtype,
    verifier: dict[str, Any],
    num_draft_tokens: int,
    lm_head: bool = True,
) -> None:
    """Write a head in Speculators format into an existing folder; aux layers are in vLLM's numbering.

    `norm_before_residual` is always written (absent means true there), and there is no `model_type` at the top level.

    `verifier` has `name_or_path` and `architectures` of the model that serves with the head. Without `lm_head` that of
    the verifier, which must be the same, is left to it.
    """
    config, architecture, width = head.config, architecture_of(head.config), head.config.verifier_hidden_size
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}
    values = {
        "architectures": [architecture.names["speculators"]],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": None if width == config.hidden_size else width,
        **written_fields(config, TOP, architecture.fields),
        "embed_requires_grad": config.own_embedding,
        AUX_IDS: vllm_layer_ids(config.aux_layers),
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name(dtype),
        LAYER: {
            "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
            **written_fields(config, LAYER, architecture.fields),
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": verifier,
        },
    }
    if not lm_head:
        values["reuse_target_lm_head"] = True
    tensors = head_tensors(head, head.state_dict(), dtype, lm_head)  # named layers.0.* in the head as in the format
    write_head_files(folder, tensors, values, record)
