"""Fields of a published head's config.json: represented, without effect, or refused by name."""

import json

import pytest
import torch
from builders import make_head
from fledge.models.formats.published import read_published_head
from fledge.models.formats.speculators import save_speculators
from published_heads import ABSENT, IDS, SHAPE, VERIFIER, assert_same_head, published, refused
from transformers import LlamaConfig, Qwen3Config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 121}, "verifier of vocab_size 121, verifier.path has 120"),
        ({"hidden_size": 64}, "verifier of hidden size 64, verifier.path has 32"),
        ({"hidden_size": 64, "target_hidden_size": 32}, "norm.weight has shape"),
        ({"target_hidden_size": 64}, "verifier of hidden size 64, verifier.path has 32"),
        ({"intermediate_size": ABSENT}, "no usable intermediate_size"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"norm_before_fc": True}, "input_norm.weight is missing"),
        (
            {"norm_before_fc": True, "eagle_config": {"norm_before_fc": False}},
            "eagle_config.norm_before_fc is False, and",
        ),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash'"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type is 'ntk'"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0, and 10000.0 in rope_p"),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_theta": 1e4}},
            "rope_theta is 500000.0, and 10000.0 in rope_scaling",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is default, and linear in rope_scaling",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}}, "rope_scaling.alpha is 1000.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
            "rotary_factor is 0.25, and",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5, a share"),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused_by_name(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    refused(theirs, words)


IDS_OF_HEAD = {IDS: [1, 3, 4]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}, "layer_types is .*one for each of 1 layers"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window is None"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 16, "use_sliding_window": False}, "window is False"),
        ({"layer_types": ["chunked_attention"]}, "layer_types is .'chunked_attention'."),
        ({"layer_types": ["linear_attention"]}, "layer_types is .'linear_attention'."),
        ({"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window is True"),
        ({"sliding_window": 16, "model_type": "mistral"}, "sliding_window is 16"),
        ({"sliding_window": 16, "model_type": "gemma3_text"}, "sliding_window is 16"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
        ({"no_rope_layers": [0]}, r"no_rope_layers is \[0\]"),
        ({"is_causal": False}, "is_causal is False"),
    ],
)
@pytest.mark.parametrize("speculators", [False, True])
def test_a_head_that_does_not_attend_to_all_is_refused_by_the_field_that_says_so(tmp_path, change, words, speculators):
    theirs = published(tmp_path)
    if speculators:
        save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
        layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
        change = {"transformer_layer_config": layer | change}
    theirs.change_config(**change)
    refused(theirs, words)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 512, "use_sliding_window": False},
        {"sliding_window": 512, "layer_types": ["full_attention"]},
        {"sliding_window": 512},  # a Llama knows no window
        {"sliding_window": 32768, "model_type": "qwen2", "max_window_layers": 28},  # off unless said otherwise
        {"sliding_window": None, "model_type": "mistral"},
        {"no_rope_layers": [1], "no_rope_layer_interval": 4, "attention_chunk_size": None},
    ],
)
def test_a_window_that_is_switched_off_changes_nothing(tmp_path, change):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    head = make_head(fc_norm=False, norm_output=False)
    assert_same_head(read_published_head(theirs.folder, SHAPE).head, head, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eagle_config": {**IDS_OF_HEAD, "eh_proj_before_attn": True}}, "eagle_config.eh_proj_before_attn is True"),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_before_fc": True}}, "input_norm.weight is missing"),
        (
            {"eagle_config": {**IDS_OF_HEAD, "fc_norm": True}},
            "eagle_config.fc_norm is True, and fc_norm is read at the top",
        ),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_output": True}}, "eagle_config.norm_output is True"),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_before_residual": True}}, "eagle_config.norm_before_residual is True"),
        ({"return_hidden_post_norm": True}, "return_hidden_post_norm is True, and .* is read in eagle_config"),
        (
            {"norm_output": False, "eagle_config": {**IDS_OF_HEAD, "return_hidden_post_norm": True}},
            "norm_output is False and eagle_config.return_hidden_post_norm True",
        ),
        ({"eagle_config": {**IDS_OF_HEAD, "head_dim": 8}}, "eagle_config.head_dim is 8"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4"),
        ({"eagle_config": [1, 3, 4]}, "eagle_config is .1, 3, 4., fields with values"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
    ],
)
def test_a_field_that_changes_the_arithmetic_is_refused_wherever_it_stands(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    refused(theirs, words)


@pytest.mark.parametrize("place", ["top", "eagle_config", "transformer_layer_config"])
@pytest.mark.parametrize("value", [True, False, 3, {"a": 1}])
def test_an_unknown_field_is_never_dropped_silently(tmp_path, place, value):
    theirs = published(tmp_path)
    if place == "transformer_layer_config":
        save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    values = json.loads((theirs.folder / "config.json").read_text())
    (values if place == "top" else values[place]).update(gated_residual=value, another_one=value, none=None)
    theirs.change_config(**values)
    path = "" if place == "top" else f"{place}."
    message = refused(theirs, "fields that fledge does not know")
    assert f"{path}gated_residual = {value!r}, {path}another_one = {value!r}; it drops none" in message


def test_a_layer_that_is_no_object_is_refused(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(transformer_layer_config="x")
    refused(theirs, "transformer_layer_config")


def test_flags_of_the_layer_must_say_what_the_top_level_says(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
    theirs.change_config(transformer_layer_config=layer | {"norm_before_residual": False, "fc_norm": True})
    read_published_head(theirs.folder, SHAPE)
    theirs.change_config(norm_before_residual=ABSENT)  # true in this format
    refused(theirs, "transformer_layer_config.norm_before_residual is False, and .* is read at the top level")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("top", [True, ABSENT])
def test_tensorrt_llms_name_of_norm_output_is_read(tmp_path, nested, top):
    theirs = published(tmp_path)
    eagle = {**IDS_OF_HEAD, "return_hidden_post_norm": nested or top is True}
    theirs.change_config(norm_output=top, eagle_config=eagle)
    assert read_published_head(theirs.folder, SHAPE).head.config.norm_output is (nested or top is True)


def test_sglangs_older_name_of_fc_norm_is_read(tmp_path):
    theirs = published(tmp_path, fc_norm=True)
    theirs.change_config(use_aux_norm=True)
    assert read_published_head(theirs.folder, SHAPE).head.config.fc_norm


MODEL_OPTIMIZER = {
    "transformers_version": "4.55.0", "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.01,
    "bos_token_id": 200000, "eos_token_id": [200001, 200007], "pad_token_id": 200018, "pretraining_tp": 1,
    "attention_dropout": 0.0, "position_embedding_type": "rope",
    "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
    "eagle_config": {
        IDS: [1, 3, 4], "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "has_lm_head": True,
        "use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    },
}  # fmt: skip
SPECFORGE = {
    "max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False, "target_model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vision_start_token_id": 151652, "video_token_id": 7,
    "image_token_id": 151655, "modal_type": "VLM", "tie_word_embeddings": True, "decoder_sparse_step": 1,
    "transformers_version": "4.53.2", "use_mrope": False, "output_router_logits": False, "_torchspec_version": "0.1",
}  # fmt: skip
ANGELSLIM = {
    "add_classification_head": False, "attention_head_dim": 16, "cla_share_factor": 2, "class_num": 0,
    "eod_token_id": 7, "dense_list": [2048, 0], "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4,
    "mask_init_id": 12, "text_end_id": 7, "norm_type": "rms", "org_vocab_size": 120, "pad_id": 2, "pool_type": "last",
    "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "text_start_id": 6, "sep_token_id": 7,
}  # fmt: skip
OLDER_TRANSFORMERS = {
    "_name_or_path": "x", "return_dict": True, "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"}, "top_k": 50,
    "is_decoder": False, "tf_legacy_loss": False, "torchscript": False, "pruned_heads": {}, "num_beams": 1,
    "task_specific_params": {}, "use_bfloat16": False, "tie_encoder_decoder": False, "temperature": 1.0,
    "typical_p": 1.0, "early_stopping": False, "add_cross_attention": False, "max_length": 20, "prefix": "",
}  # fmt: skip


@pytest.mark.parametrize("fields", [MODEL_OPTIMIZER, SPECFORGE, ANGELSLIM, OLDER_TRANSFORMERS])
def test_fields_that_projects_write_beside_the_arithmetic_are_no_obstacle(tmp_path, fields):
    theirs = published(tmp_path)
    theirs.change_config(**fields)
    config = read_published_head(theirs.folder, SHAPE).head.config
    rope = {name: value for name, value in config.rope_parameters.items() if name != "mrope_section"}
    assert rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_fields_that_speculators_writes_are_read(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
    for written in (
        LlamaConfig(**layer).to_dict(),
        Qwen3Config(**layer).to_dict(),
        Qwen3Config(**layer).to_diff_dict(),
    ):
        theirs.change_config(transformer_layer_config=written, auto_map={"": "config.Eagle3SpeculatorConfig"})
        assert_same_head(read_published_head(theirs.folder, SHAPE).head, make_head(), torch.bfloat16)
