"""Weights of published heads that are refused, by name."""

from pathlib import Path

import pytest
import torch
from published_heads import ABSENT, published, refused
from safetensors.torch import save_file


def test_every_wrong_tensor_is_named_in_one_refusal(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(
        norm__weight=ABSENT,
        fc__weight=torch.ones(32, 64),
        midlayer__self_attn__q_proj__bias=torch.ones(64),
        midlayer__self_attn__q_norm__weight=torch.ones(16),
        midlayer__mlp__up_proj__bias=torch.ones(48),
        model__norm__weight=torch.ones(32),
        layers__0__hidden_norm__weight=torch.ones(32),
        midlayer__input_layernorm__weight=torch.ones(32, dtype=torch.int32),
        t2d=torch.ones(100, dtype=torch.bool),
        embed_tokens__weight=torch.ones(100, 32),
    )
    message = refused(theirs, "norm.weight is missing")
    for words in (
        "fc.weight has shape [32, 64], [32, 96] is required",
        "layers.0.self_attn.q_proj.bias is unknown",
        "layers.0.self_attn.k_norm.weight is missing",
        "layers.0.mlp.up_proj.bias is unknown",
        "model.norm.weight is unknown",
        "layers.0.hidden_norm.weight stands twice",
        "layers.0.input_layernorm.weight is int32",
        "t2d has shape [100], [120] is required",
        "embed_tokens.weight has shape [100, 32], [120, 32] is required",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lm_head__weight": ABSENT}, "lm_head.weight is missing.*fetch the head's complete checkpoint"),
        ({"d2t": ABSENT}, "d2t is missing"),
        ({"d2t": torch.arange(100)}, "0 to 119 is required: it must hold offsets"),
        ({"d2t": torch.full((100,), -1)}, "target ids from -1 to 98"),
        ({"d2t": torch.arange(99, -1, -1)}, "do not increase"),
        ({"d2t": torch.zeros(100)}, "d2t is float32, integers"),
        ({"t2d": torch.ones(120, dtype=torch.bool)}, "t2d contradicts d2t"),
        ({"fc__weight": torch.ones(32, 96, dtype=torch.float64)}, "fc.weight is float64"),
    ],
)
def test_a_wrong_lm_head_or_vocabulary_map_is_refused(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_tensors(**change)
    refused(theirs, words)


class Code:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, legacy):
    theirs = published(tmp_path)
    witness = tmp_path / "was run"
    content = {**theirs.tensors(), "x": Code(witness)}
    torch.save(content, theirs.folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (theirs.folder / "model.safetensors").unlink()
    refused(theirs, "code in it was not run")
    assert not witness.exists()
    torch.load(theirs.folder / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the code works where it is run, or nothing is shown"


@pytest.mark.parametrize(("said", "held"), [(8, 1), (42, 1), (1, 2)])
def test_a_number_of_layers_that_the_weights_do_not_hold_is_one_sentence(tmp_path, said, held):
    theirs = published(tmp_path, num_layers=held)
    theirs.change_config(num_hidden_layers=said)
    message = refused(theirs, f"num_hidden_layers {said}, and the weights hold {held}: write num_hidden_layers: {held}")
    assert "missing" not in message


@pytest.mark.parametrize("prefix", ["draft_model.", "module.", "eagle_module._orig_mod."])
def test_a_prefix_before_every_tensor_is_named(tmp_path, prefix):
    theirs = published(tmp_path)
    tensors = {prefix + name: tensor for name, tensor in theirs.tensors().items()}
    save_file(tensors, theirs.folder / "model.safetensors")
    assert "missing" not in refused(theirs, f"tensors begin with '{prefix}'.*rename them without it")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "lm_head.weight", "embed_tokens.weight"])
def test_a_quantised_tensor_is_refused_by_name(tmp_path, dtype, name):
    theirs = published(tmp_path)
    tensors = {n.replace("midlayer.", "layers.0."): tensor for n, tensor in theirs.tensors().items()}
    tensors[name] = tensors.get(name, torch.ones(120, 32)).to(dtype)
    save_file(tensors, theirs.folder / "model.safetensors")
    refused(theirs, f"{name} is {str(dtype).removeprefix('torch.')}, float32, bfloat16 or float16 is required")


def test_damaged_files_are_refused(tmp_path):
    theirs = published(tmp_path)
    weights = theirs.folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-100], whole[:40], b""):
        weights.write_bytes(content)
        refused(theirs, "model.safetensors cannot be read as weights")
    weights.unlink()
    refused(theirs, "holds no weights")
    for content in (b"", b"not a pickle", b"PK\x03\x04 not an archive"):
        (theirs.folder / "pytorch_model.bin").write_bytes(content)
        refused(theirs, "pytorch_model.bin (cannot be read|is damaged)")
    for content in ([torch.ones(1)], {"fc.weight": 1}, {1: torch.ones(1)}):
        torch.save(content, theirs.folder / "pytorch_model.bin")
        refused(theirs, "something else than named tensors")
    index = theirs.folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"fc.weight": "../elsewhere.safetensors"}}')
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    refused(theirs, "elsewhere.safetensors is named by the index and missing")
    index.write_text("[]")
    refused(theirs, "is not an index")
    for content in ("{", "[]"):
        (theirs.folder / "config.json").write_text(content)
        weights.write_bytes(whole)
        refused(theirs, "config.json is not")
    (theirs.folder / "config.json").unlink()
    refused(theirs, "config.json is missing")
