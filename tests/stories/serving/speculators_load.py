"""Run in vLLM's environment: load the head in a folder (the argument) with the speculators library, and print what it
made of the files, as JSON."""

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
FIELDS = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "embed_requires_grad",
    "draft_vocab_size",
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
)
LAYER_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "layer_types",
    "sliding_window",
)
VERIFIERS_OWN = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}  # read from the verifier


def main() -> None:
    import torch
    from safetensors.torch import load_file
    from speculators import SpeculatorModel

    folder = Path(sys.argv[1])
    tensors = load_file(folder / "model.safetensors")
    model = SpeculatorModel.from_pretrained(folder)
    loaded = model.state_dict()
    config = model.config
    answer = {
        "class": type(model).__name__,
        "fields": {name: getattr(config, name) for name in FIELDS},
        "layer": {name: getattr(config.transformer_layer_config, name, None) for name in LAYER_FIELDS},
        "verifier": config.speculators_config.verifier.model_dump(),
        "num_draft_tokens": config.speculators_config.proposal_methods[0].speculative_tokens,
        "num_tensors": len(tensors),
        "missing": sorted(loaded.keys() - tensors.keys() - VERIFIERS_OWN),
        "unexpected": sorted(tensors.keys() - loaded.keys()),
        "unequal": sorted(n for n in tensors.keys() & loaded.keys() if not torch.equal(tensors[n], loaded[n])),
        "not_finite": sorted(n for n, tensor in loaded.items() if not bool(tensor.isfinite().all())),
    }
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
