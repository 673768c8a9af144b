"""Quantised verifiers: loaded, watched and read as transformers computes with them, or refused in one sentence."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from architectures import make_model, save_verifier
from builders import Run
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.schema import Dtype
from fledge.data_synthesis.states.transformers_engine import read_documents
from fledge.models.verifier.model import Verifier, check_capture, load_final_norm
from fledge.models.verifier.weights import VerifierWeights, verifier_identity
from quantised import SCHEMES, quantise, quantise_in_float8_blocks, quantise_in_mxfp4, set_quantisation
from safetensors.torch import load_file, save_file

VOCAB = 600
IDS = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain(tmp_path, verifier):
    return save_verifier(make_model("llama", VOCAB), verifier.tokenizer, tmp_path)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_states_of_a_quantised_verifier_are_captured_and_give_its_logits(tmp_path, plain, kind, dtype):
    dense = Verifier.load(plain).forward(IDS).aux_hidden_states
    plain.dtype = dtype
    quantise(tmp_path, kind)
    verifier = Verifier.load(plain)
    output = verifier.forward(IDS, use_cache=False, output_hidden_states=True)
    aux = torch.cat([output.hidden_states[layer + 1] for layer in verifier.aux_layers], dim=-1)
    assert torch.equal(output.aux_hidden_states, aux)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert 1e-3 < relative(output.aux_hidden_states, dense) < (0.5 if "nvfp4" in kind else 0.2)
    again = output.last_hidden_state @ VerifierWeights(plain).lm_head().to(output.logits.dtype).T
    torch.testing.assert_close(again, output.logits, rtol=1e-5, atol=1e-5)
    check_capture(verifier, IDS)
    assert len(list(read_documents(verifier, list(IDS), 100))) == 2
    assert torch.equal(load_final_norm(plain).weight, verifier.model.model.norm.weight)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_a_quantised_lm_head_is_read_as_the_model_computes_with_it(tmp_path, plain, kind, dtype):
    dense = VerifierWeights(plain).lm_head()
    plain.dtype = dtype
    quantise(tmp_path, kind, left_out=())
    verifier, found = Verifier.load(plain), VerifierWeights(plain).lm_head()
    output = verifier.forward(IDS, use_cache=False)
    rounding = 0 if dtype is Dtype.float32 else 2**-7  # of the scale, then of the product
    torch.testing.assert_close(found, verifier.model.lm_head.weight, rtol=rounding, atol=0)
    assert 1e-3 < relative(found, dense) < 0.2
    assert len(list(read_documents(verifier, list(IDS), 100))) == 2, "its logits are checked"
    again = output.last_hidden_state @ found.T
    assert relative(again, output.logits.float()) < (0.2 if kind == "nvfp4" else 0.03), "its inputs are rounded too"


def test_a_quantised_verifier_without_lm_head_is_not_taken_for_a_tied_one(tmp_path, plain):
    quantise(tmp_path, "w4a16", left_out=())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "lm_head" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"has no tensor \*\.lm_head\.weight"):
        VerifierWeights(plain).lm_head()


def test_a_float8_lm_head_with_a_scale_a_block_is_read(tmp_path, plain):
    dense = VerifierWeights(plain).lm_head()
    rows, columns = 128, 32  # 600 rows: the last blocks are cut off
    padded = torch.nn.functional.pad(dense, (0, 0, 0, -len(dense) % rows))
    blocks = padded.view(-1, rows, padded.shape[1] // columns, columns)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    weight = (blocks / scales).reshape(padded.shape)[: len(dense)].to(torch.float8_e4m3fn)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"lm_head.weight": weight, "lm_head.weight_scale_inv": scales[:, 0, :, 0].contiguous()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    set_quantisation(tmp_path, {"quant_method": "fp8", "weight_block_size": [rows, columns]})
    assert relative(VerifierWeights(plain).lm_head(), dense) < 0.04


@pytest.mark.parametrize(
    ("stated", "file"),
    [({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None), (None, "hf_quant_config.json")],
)
def test_what_only_an_engine_can_run_is_refused_and_its_own_weights_are_read_all_the_same(
    tmp_path, plain, stated, file
):
    expected = VerifierWeights(plain).lm_head()
    norm = Verifier.load(plain).model.model.norm.weight
    if stated is not None:
        set_quantisation(tmp_path, stated)
    else:
        (tmp_path / file).write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(
        ValueError, match=r"is quantised by modelopt, which transformers cannot run: set dump\.engine=vllm"
    ):
        Verifier.load(plain)
    assert torch.equal(VerifierWeights(plain).lm_head(), expected)
    assert torch.equal(load_final_norm(plain).weight, norm)


def test_an_lm_head_in_a_form_that_is_not_known_is_refused_by_name(tmp_path, plain):
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "lm_head.weight": torch.zeros(VOCAB, 32, dtype=torch.uint8),
        "lm_head.weight_scale": torch.ones(VOCAB, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    set_quantisation(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(ValueError, match=r"holds lm_head in a quantised form .*\(weight, weight_scale\)"):
        VerifierWeights(plain).lm_head()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, plain, monkeypatch):
    quantise(tmp_path, "w4a16")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ValueError, match=r"which is not installed: run `pip install compressed-tensors`"):
        Verifier.load(plain)


def test_nvfp4_in_another_dtype_than_bfloat16_is_dequantised_and_says_so(tmp_path, plain, capsys):
    quantise(tmp_path, "nvfp4")
    Verifier.load(plain)
    assert f"verifier: {tmp_path} (nvfp4-pack-quantized) is dequantised, since" in capsys.readouterr().out
    plain.dtype = Dtype.bfloat16
    Verifier.load(plain)
    assert "dequantised" not in capsys.readouterr().out


def test_another_scheme_is_another_verifier(tmp_path, verifier):
    model = make_model("llama", VOCAB)
    found = set()
    for kind in (None, "fp8", "int8", "w4a16", "nvfp4"):
        config = save_verifier(model, verifier.tokenizer, tmp_path / str(kind), max_shard_size="200KB")
        if kind is not None:
            quantise(tmp_path / kind, kind)
        assert verifier_identity(config) == verifier_identity(config)
        found.add(verifier_identity(config)["fingerprint"])
    assert len(found) == 5


@pytest.mark.parametrize("kind", ["fp8", "w4a16", "nvfp4a16"])
@pytest.mark.parametrize("name", ["llama 4 text", "llama 4"])
def test_experts_are_quantised_too(tmp_path, verifier, name, kind):
    config = save_verifier(make_model(name, VOCAB), verifier.tokenizer, tmp_path)
    dense = Verifier.load(config).forward(IDS).aux_hidden_states
    per_expert(tmp_path)
    quantise(tmp_path, kind, left_out=("lm_head", "vision", "multi_modal_projector", "router", "mlp.gate$"))
    loaded = Verifier.load(config)
    assert 1e-3 < relative(loaded.forward(IDS).aux_hidden_states, dense) < 0.2
    check_capture(loaded, IDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "w4a16"), ("llama", "w4a16, zero points"), ("llama", "nvfp4a16"), ("qwen3 moe", "w4a16")],
)
def test_weights_in_few_bits_are_what_is_computed_with(tmp_path, verifier, name, kind):
    model = make_model(name, VOCAB)
    config = save_verifier(model, verifier.tokenizer, tmp_path)
    rounded = load_file(tmp_path / "model.safetensors")
    rounded |= quantise(tmp_path, kind, left_out=("lm_head", "mlp.gate$"))
    found = Verifier.load(config).forward(IDS).aux_hidden_states
    save_verifier(model, verifier.tokenizer, tmp_path)
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(found, Verifier.load(config).forward(IDS).aux_hidden_states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize(
    ("name", "quantise_as_published"),
    [("qwen3 moe", quantise_in_float8_blocks), ("gpt-oss", quantise_in_mxfp4)],
)
def test_what_publishers_quantised_is_dequantised_on_the_cpu(tmp_path, verifier, name, quantise_as_published, dtype):
    model = make_model(name, VOCAB).bfloat16()
    config = save_verifier(model, verifier.tokenizer, tmp_path, dtype)
    rounded = load_file(tmp_path / "model.safetensors")
    rounded |= quantise_as_published(tmp_path)
    loaded = Verifier.load(config)
    found = loaded.forward(IDS).aux_hidden_states
    check_capture(loaded, IDS)
    save_verifier(model, verifier.tokenizer, tmp_path)
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    expected = Verifier.load(config).forward(IDS).aux_hidden_states
    assert found.dtype is expected.dtype is getattr(torch, dtype.value)
    assert torch.equal(found, expected)


def test_a_w4a16_verifier_writes_its_conversations_and_its_states(tmp_path, tiny_verifier_folder):
    folder = tmp_path / "verifier"
    shutil.copytree(tiny_verifier_folder, folder)
    quantise(folder, "w4a16")
    run = Run(tmp_path / "runs", folder)
    few = "data.sources=[{path:embedded,limit:24}]"
    run("synthesize", few)
    run("dump", few)
    manifest = read_manifest(run.path / "hidden_states", "hidden_states")
    assert manifest["complete"]
    assert manifest["counts"]["counted_tokens"] > 100


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nvfp4a16", "has experts in nvfp4-pack-quantized with .*: set dump.engine=vllm"),
        ("w4a16, zero points", "has experts in pack-quantized with .*: set dump.engine=vllm"),
        ("int8", "cannot be loaded by transformers"),
    ],
)
def test_experts_that_transformers_would_compute_wrongly_are_refused(tmp_path, verifier, kind, said):
    config = save_verifier(make_model("qwen3 moe", VOCAB), verifier.tokenizer, tmp_path)
    quantise(tmp_path, kind, left_out=("lm_head", "mlp.gate$"))
    with pytest.raises(ValueError, match=said):
        Verifier.load(config)


def per_expert(folder: Path) -> None:
    """Give the experts of a Llama 4 checkpoint matrices of their own, as quantised ones have."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        fused, (prefix, _, kind) = tensors.pop(name), name.rpartition(".")
        for number, matrix in enumerate(fused):
            parts = {"down_proj": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2, dim=-1), strict=True))
            for part, values in parts.items():
                tensors[f"{prefix}.{number}.{part}.weight"] = values.T.contiguous()
    save_file(tensors, file, {"format": "pt"})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
