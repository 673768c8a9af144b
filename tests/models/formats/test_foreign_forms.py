"""Heads of further forms as other projects write them, built of plain dictionaries and tensors."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fledge.conf.schema import HeadImportConfig
from fledge.models.formats.published import PublishedHead, halves_from_pairs, read_published_head
from published_heads import IDS, SHAPE
from safetensors.torch import save_file

LAYER = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 1, "vocab_size": 120, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
# NVIDIA's head for gpt-oss: everything EAGLE-3 is nested, ids count boundaries, lm_head is the verifier's.
GPT_OSS = {
    **LAYER, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": None,
    "mlp_bias": False, "eagle_config": {
        IDS: [2, 6, 8], "use_aux_hidden_state": True, "norm_before_fc": True, "use_last_layernorm": True,
        "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1, "has_lm_head": True,
        "parallel_draft_heads_num_layers": 1, "use_input_layernorm_in_first_layer": True,
    },
}  # fmt: skip
SPECFORGE = {
    **LAYER, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 100,
    "num_hidden_layers": 2, "eagle_config": {IDS: [1, 3, 4], "use_aux_hidden_state": True}, "pretraining_tp": 1,
}  # fmt: skip
QWEN3 = {
    **LAYER, "architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3", "draft_vocab_size": 100,
    "max_window_layers": 28, "sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"],
    "eagle_config": {IDS: [1, 4], "use_aux_hidden_state": True}, "partial_rotary_factor": 0.5,
}  # fmt: skip
# As the classes of Speculators 0.9 write their default, and a layer without its window.
SPECULATORS = {
    "architectures": ["Eagle3DraftModel"], "auto_map": {"": "config.Eagle3SpeculatorConfig"}, "draft_vocab_size": 100,
    "dtype": "float32", IDS: [2, 4, 5, 8], "embed_requires_grad": False, "fc_norm": False, "norm_before_fc": True,
    "norm_before_residual": True, "norm_output": True, "speculators_config": {
        "algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1},
        ], "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/verifier"},
    }, "speculators_model_type": "eagle3", "speculators_version": "0.9.0", "target_hidden_size": None,
    "tie_word_embeddings": False, "transformer_layer_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 256, "mlp_bias": False,
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": None,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 2048, "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": True,
        "vocab_size": 120,
    }, "transformers_version": "5.19.0",
}  # fmt: skip


def tensors(first: str, layers: int = 1, aux: int = 3, rows: int | None = 100) -> dict[str, torch.Tensor]:
    """Random tensors of a head, those of its layers named as vLLM and Speculators train them."""
    generator = torch.Generator().manual_seed(layers)
    names = [first, *(f"layers.{layer}" for layer in range(1, layers))]
    shapes = {"fc": [32, aux * 32], "norm": [32], **({"lm_head": [rows, 32]} if rows else {})}
    for name in names:
        width = 64 if name == first else 32
        shapes |= {
            f"{name}.self_attn.q_proj": [64, width], f"{name}.self_attn.k_proj": [32, width],
            f"{name}.self_attn.v_proj": [32, width], f"{name}.self_attn.o_proj": [32, 64],
            f"{name}.mlp.gate_proj": [48, 32], f"{name}.mlp.up_proj": [48, 32], f"{name}.mlp.down_proj": [32, 48],
            f"{name}.input_layernorm": [32], f"{name}.post_attention_layernorm": [32],
            **({f"{name}.hidden_norm": [32]} if name == first else {}),
        }  # fmt: skip
    found = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    d2t = torch.arange(100) // 90 * 20  # the last ten stand for the last ten of 120
    return found | ({"d2t": d2t} if rows else {})


def read(
    folder: Path, values: dict, weights: dict[str, torch.Tensor], model_type: str = "llama", **options: object
) -> PublishedHead:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(120, 32, generator=generator)
    verifier = SimpleNamespace(embedding=lambda: matrix, lm_head=lambda: -matrix)
    shape = SimpleNamespace(**{**SHAPE.to_dict(), "model_type": model_type})
    return read_published_head(folder, shape, HeadImportConfig(**options), verifier)


def assert_holds(found: PublishedHead, weights: dict[str, torch.Tensor]) -> None:
    """Hold every tensor of the head against the one of the file."""
    state = found.head.state_dict()
    ours = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items() if name != "d2t"}
    assert state.keys() - ours.keys() <= {"lm_head.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())


def test_nvidias_head_for_gpt_oss(tmp_path):
    weights = tensors("midlayer", rows=None) | {"input_norm.weight": torch.rand(96)}
    found = read(tmp_path, GPT_OSS, weights, "gpt_oss")
    config = found.head.config
    assert (config.aux_layers, config.norm_before_fc, config.norm_output) == ((1, 5, 7), True, False)
    assert config.draft_vocab_size == 120
    assert_holds(found, weights)
    assert_holds(read(tmp_path, {**GPT_OSS, IDS: [2, 6, 8]}, weights, "gpt_oss"), weights)
    with pytest.raises(ValueError, match=r"\[3, 7, 9\] at the top level and \[2, 6, 8\] in eagle_config"):
        read(tmp_path, {**GPT_OSS, IDS: [3, 7, 9]}, weights, "gpt_oss")
    with pytest.raises(ValueError, match=r"the aux layers are \[2, 6, 8\] \(0-based\), different ones from 0 to 7"):
        read(tmp_path, GPT_OSS, weights)


@pytest.mark.parametrize("norm", ["input_layernorm", "hidden_norm"])
def test_specforges_head_of_two_layers(tmp_path, norm):
    weights = tensors("midlayer", layers=2)
    written = {name.replace("layers.1.input_layernorm", f"layers.1.{norm}"): tensor for name, tensor in weights.items()}
    found = read(tmp_path, SPECFORGE, written)
    assert found.head.config.num_layers == 2
    assert_holds(found, weights)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_head_in_the_shape_of_qwen3(tmp_path, pairs):
    weights = tensors("midlayer", aux=2)
    weights |= {f"midlayer.self_attn.{name}_norm.weight": torch.rand(16) for name in "qk"}
    found = read(tmp_path, QWEN3, weights, interleaved_rotary=pairs)
    config = found.head.config
    assert (config.qk_norm, config.sliding_window, config.window_layers) == (True, 64, (0,))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if not pairs:
        assert_holds(found, weights)
        return
    order = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]  # of each attention head, of which 8 dimensions are rotated
    state = found.head.state_dict()
    for name, heads in (("q_norm", 1), ("q_proj", 4), ("k_proj", 2)):
        theirs = weights[f"midlayer.self_attn.{name}.weight"].unflatten(0, (heads, 16))
        assert torch.equal(state[f"layers.0.self_attn.{name}.weight"].unflatten(0, (heads, 16)), theirs[:, order])
    biases = {"layers.0.self_attn.q_proj.bias": torch.arange(64.0)}
    assert halves_from_pairs(biases, config)["layers.0.self_attn.q_proj.bias"][16:].tolist()[:8] == [
        16 + dimension for dimension in order[:8]
    ]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_head_of_speculators_by_its_defaults_with_a_full_layer(tmp_path, model_type):
    layer = {**SPECULATORS["transformer_layer_config"], "model_type": model_type}
    weights = tensors("layers.0", layers=2, aux=4) | {"input_norm.weight": torch.rand(128)}
    if model_type == "qwen3":
        norms = itertools.product(range(2), "qk")
        weights |= {f"layers.{i}.self_attn.{name}_norm.weight": torch.rand(16) for i, name in norms}
    found = read(tmp_path, {**SPECULATORS, "transformer_layer_config": layer}, weights)
    config = found.head.config
    assert (config.sliding_window, config.window_layers) == (2048, (0,))
    assert (config.aux_layers, config.norm_before_fc, config.norm_before_residual) == ((1, 3, 4, 7), True, True)
    assert (config.fc_norm, config.norm_output, config.own_embedding) == (False, True, False)
    assert config.qk_norm is (model_type == "qwen3")
    assert_holds(found, weights)
