"""Heads in the formats of engines and other projects: written, and read back bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from builders import make_head
from fledge.conf.schema import (
    ExportFormat,
    HeadImportConfig,
)
from fledge.models.export import export
from fledge.models.formats.plain import load_head, save_head
from fledge.models.formats.published import read_published_head
from fledge.models.formats.speculators import save_speculators
from fledge.models.import_head import import_head
from published_heads import ABSENT, SHAPE, VERIFIER, Published, assert_same_head, published, refused
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

FORMS = [
    {},
    {"draft_vocab_size": None},
    {"fc_norm": False, "norm_output": False},
    {"norm_before_residual": True},
    {"aux_layers": (2, 5), "draft_vocab_size": None},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"hidden_size": 24, "own_embedding": True},
    {"own_embedding": True},
    {"norm_before_fc": True},
    {"attention_bias": True},
    {"qk_norm": True, "num_layers": 2},
    {"qk_norm": True, "sliding_window": 32, "window_layers": (0,), "aux_layers": (0, 1, 3, 4)},
    {"num_layers": 3, "draft_vocab_size": None},
    {"num_layers": 3, "sliding_window": 32, "window_layers": (0, 2), "attention_bias": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {  # Speculators' default, in 0.9
        "fc_norm": False,
        "norm_before_fc": True,
        "norm_before_residual": True,
        "sliding_window": 2048,
        "window_layers": (0,),
        "aux_layers": (1, 3, 4, 7),
    },
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", FORMS)
def test_each_format_reads_back_bit_for_bit(tmp_path, changes, dtype):
    head = make_head(**changes)
    save_head(tmp_path, head, {}, dtype)
    assert_same_head(load_head(tmp_path)[0], head, dtype)
    plain = read_published_head(tmp_path, SHAPE)
    save_speculators(tmp_path, head, {}, dtype, VERIFIER, 3)
    speculators = read_published_head(tmp_path, SHAPE)
    for read in (plain, speculators):
        assert_same_head(read.head, head, dtype)
        assert read.dtype == dtype


def test_speculators_config_has_the_fields_that_vllm_reads(tmp_path):
    save_speculators(tmp_path, make_head(), {}, torch.bfloat16, VERIFIER, 5)
    values = json.loads((tmp_path / "config.json").read_text())
    layer = values.pop("transformer_layer_config")
    assert isinstance(values.pop("speculators_version"), str)
    assert values == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 100,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": VERIFIER,
        },
    }
    assert layer["model_type"] == "llama"
    assert (layer["vocab_size"], layer["num_hidden_layers"], layer["head_dim"]) == (120, 1, 16)
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert LlamaConfig(**layer).rope_parameters == layer["rope_parameters"]


@pytest.mark.parametrize(("size", "has_map"), [(100, True), (None, False)])
def test_speculators_tensors_are_named_by_layer_and_mapped_only_if_reduced(tmp_path, size, has_map):
    save_speculators(tmp_path, make_head(draft_vocab_size=size), {}, torch.bfloat16, VERIFIER, 3)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("midlayer" in name for name in tensors)
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert ({"d2t", "t2d"} <= tensors.keys()) is has_map
    assert "embed_tokens.weight" not in tensors


def as_sharded(theirs: Published) -> None:
    tensors = theirs.tensors()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, theirs.folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (theirs.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (theirs.folder / "model.safetensors").unlink()


def as_pickle(theirs: Published) -> None:
    torch.save(theirs.tensors(), theirs.folder / "pytorch_model.bin")
    (theirs.folder / "model.safetensors").unlink()


def as_numbered_layers(theirs: Published) -> None:
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in theirs.tensors().items()}
    save_file(tensors, theirs.folder / "model.safetensors")


@pytest.mark.parametrize("rewrite", [lambda _: None, as_sharded, as_pickle, as_numbered_layers])
@pytest.mark.parametrize("size", [100, None])
def test_published_forms_are_read(tmp_path, rewrite, size):
    theirs = published(tmp_path, draft_vocab_size=size)
    rewrite(theirs)
    read = read_published_head(theirs.folder, SHAPE)
    head = make_head(fc_norm=False, norm_output=False, draft_vocab_size=size)
    assert_same_head(read.head, head, torch.bfloat16)
    assert read.dtype == torch.bfloat16


def test_t2d_is_made_of_d2t_where_it_is_absent(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(t2d=ABSENT)
    assert_same_head(
        read_published_head(theirs.folder, SHAPE).head, make_head(fc_norm=False, norm_output=False), torch.bfloat16
    )


def test_a_full_vocabulary_may_come_with_its_identity_map(tmp_path):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(d2t=torch.zeros(120, dtype=torch.int64), t2d=torch.ones(120, dtype=torch.bool))
    head = make_head(fc_norm=False, norm_output=False, draft_vocab_size=None)
    assert_same_head(read_published_head(theirs.folder, SHAPE).head, head, torch.bfloat16)


def test_weights_of_two_dtypes_are_kept_in_the_wider(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(norm__weight=theirs.tensors()["norm.weight"].float() + 1e-6)
    read = read_published_head(theirs.folder, SHAPE)
    assert read.dtype == torch.float32
    assert torch.equal(read.head.norm.weight, theirs.tensors()["norm.weight"])


def test_older_rotary_fields_are_joined(tmp_path):
    theirs = published(tmp_path)
    scaling = {"type": "linear", "factor": 8.0}
    theirs.change_config(rope_theta=5e5, rope_scaling=scaling)
    config = read_published_head(theirs.folder, SHAPE).head.config
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [
        ({"type": "mrope", "mrope_section": [2, 3, 3]}, "default"),
        ({"rope_type": "mrope", "mrope_section": [2, 3, 3], "mrope_interleaved": True}, "default"),
        ({"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}, "longrope"),
        ({"type": "default", "rope_type": "default"}, "default"),
    ],
)
def test_other_names_of_a_rotary_type_are_read(tmp_path, scaling, kind):
    theirs = published(tmp_path)
    theirs.change_config(rope_scaling=scaling)
    assert read_published_head(theirs.folder, SHAPE).head.config.rope_parameters["rope_type"] == kind


@pytest.mark.parametrize("present", [True, False])
def test_norm_before_residual_absent_means_what_each_format_means(tmp_path, present):
    theirs = published(tmp_path)
    assert read_published_head(theirs.folder, SHAPE).head.config.norm_before_residual is False
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(norm_before_residual=False if present else ABSENT)
    assert read_published_head(theirs.folder, SHAPE).head.config.norm_before_residual is not present


def test_an_early_speculators_head_is_read_with_the_formats_defaults(tmp_path):
    theirs = published(tmp_path)
    head = make_head(fc_norm=False, norm_output=False, norm_before_residual=True)
    save_speculators(theirs.folder, head, {}, torch.bfloat16, VERIFIER, 3)
    later = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
    theirs.change_config(
        **dict.fromkeys(later, ABSENT),
        architectures=["Eagle3Speculator"],
        eagle_aux_hidden_state_layer_ids=ABSENT,
    )
    layers = HeadImportConfig(aux_layers=[1, 3, 4])
    assert_same_head(read_published_head(theirs.folder, SHAPE, layers).head, head, torch.bfloat16)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_each_engine_finds_the_layers_and_norms_that_it_looks_for(tmp_path, num_layers):
    head = make_head(num_layers=num_layers)
    save_head(tmp_path, head, {}, torch.float32)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.startswith("midlayer.") for name in names) is (num_layers == 1)
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == set("012" if num_layers > 1 else "")
    for layer in range(1, num_layers):
        both = [load_file(tmp_path / "model.safetensors")[f"layers.{layer}.{norm}.weight"] for norm in NORMS]
        assert torch.equal(*both)
        assert torch.equal(both[0], head.state_dict()[f"layers.{layer}.input_layernorm.weight"])
    save_speculators(tmp_path, head, {}, torch.float32, VERIFIER, 3)  # vLLM's alone
    assert set(load_file(tmp_path / "model.safetensors")) == {*head.state_dict(), "d2t", "t2d"}


NORMS = ("input_layernorm", "hidden_norm")


@pytest.mark.parametrize("left_out", NORMS)
def test_the_norm_of_a_later_layer_is_read_by_either_name(tmp_path, left_out):
    theirs = published(tmp_path, num_layers=2)
    theirs.change_tensors(**{f"layers__1__{left_out}__weight": ABSENT})
    head = make_head(fc_norm=False, norm_output=False, num_layers=2)
    assert_same_head(read_published_head(theirs.folder, SHAPE).head, head, torch.bfloat16)


def test_two_different_norms_of_a_later_layer_are_refused(tmp_path):
    theirs = published(tmp_path, num_layers=2)
    theirs.change_tensors(layers__1__hidden_norm__weight=torch.ones(32))
    refused(theirs, "layers.1.hidden_norm.weight and layers.1.input_layernorm.weight differ, .*remove the one")


def test_a_head_of_several_layers_is_imported_exported_and_imported_again(tmp_path, config):
    theirs = published(tmp_path, num_layers=2)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    head = load_head(Path(config.export.checkpoint))[0]
    config.export.format = ExportFormat.all
    export(config)
    for name in ("plain", "speculators"):
        config.head_import.source = str(config.run_folder / "exports" / name)
        import_head(config)
        assert_same_head(load_head(config.run_folder / "imports" / name)[0], head, torch.bfloat16)
