"""A verifier with a PEFT adapter: merged once, and read like any other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import Run, composed
from commands import popen
from fledge.conf.schema import Dtype, VerifierConfig
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.models.verifier import adapter as adapters
from fledge.models.verifier.config import load_config, load_tokenizer, verifier_location
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import VerifierWeights, verifier_identity, verifier_outline
from fledge.slurm.jobs.render import SERVER, mounted_paths, render_jobs
from huggingface_hub import constants
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def make_adapter(base: Path, folder: Path, config: object) -> Path:
    """Write an adapter of random numbers."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(tiny_verifier_folder, tmp_path) -> VerifierConfig:
    """The tiny verifier with a LoRA adapter."""
    adapters.merged_folder.cache_clear()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made = make_adapter(tiny_verifier_folder, tmp_path / "adapter", config)
    return VerifierConfig(
        str(tiny_verifier_folder), adapter=str(made), merged_dir=str(tmp_path / "merged"), dtype=Dtype.float32
    )


def test_it_gives_what_peft_gives(lora, tokens):
    with_adapter = Verifier.load(lora)
    base = AutoModelForCausalLM.from_pretrained(lora.path)
    alone = base(tokens).logits
    expected = PeftModel.from_pretrained(base, lora.adapter)(tokens).logits
    found = with_adapter.forward(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - alone).abs().max() > 0.1


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(10, 500, (1, 24), generator=torch.Generator().manual_seed(0))


def test_another_kind_of_adapter_is_merged_too(lora, tokens, tmp_path):
    kind = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    other = replace(lora, adapter=str(make_adapter(Path(lora.path), tmp_path / "ia3", kind)))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lora.path), other.adapter)(tokens).logits
    torch.testing.assert_close(Verifier.load(other).forward(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_it_is_merged_once_and_named_by_what_is_in_it(lora, capsys, tmp_path):
    folder = Path(verifier_location(lora))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    adapters.merged_folder.cache_clear()  # as in another process
    assert Path(verifier_location(lora)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("merges") == 1
    alone = replace(lora, adapter=None)
    assert load_tokenizer(lora).chat_template == load_tokenizer(alone).chat_template
    assert load_config(lora).hidden_size == load_config(alone).hidden_size
    weights, other = Path(lora.adapter) / "adapter_model.safetensors", tmp_path / "other"
    shutil.copytree(lora.path, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    more = [replace(lora, path=str(other)), lora]
    found = [verifier_location(more[0])]
    assert load_tokenizer(more[0]).chat_template == "{{ messages[0].content }}"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    adapters.merged_folder.cache_clear()
    found.append(verifier_location(lora))
    assert len({str(folder), *found}) == 3, "another template, and an adapter that was trained on"


def test_its_identity_is_another_even_where_the_weights_that_are_looked_at_are_the_same(lora):
    alone = verifier_identity(replace(lora, adapter=None))
    outline = verifier_outline(lora)
    assert outline.pop("merged")
    assert outline == {name: alone[name] for name in outline}
    served = VerifierConfig(verifier_location(lora))
    assert verifier_identity(served) == verifier_identity(lora), "the merged folder by its path is the same verifier"


def test_processes_that_begin_together_merge_once(lora):
    arguments = f"{lora.path!r}, adapter={lora.adapter!r}, merged_dir={lora.merged_dir!r}"
    code = (
        "from fledge.models.verifier.config import verifier_location\nfrom fledge.conf.schema import VerifierConfig\n"
        f"print(verifier_location(VerifierConfig({arguments})))"
    )
    started = [popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in started]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert sum(text.count("merges") for text in said) == 1


def test_a_merge_that_was_killed_is_made_again(lora, monkeypatch):
    left = Path(verifier_location(lora, make=False))
    assert not left.exists()
    temporary = left.with_name(f".{left.name}.tmp")
    temporary.mkdir(parents=True)
    (temporary / "model-00001-of-00002.safetensors").write_text("a part")
    assert verifier_location(lora) == str(left)
    assert not list(left.glob("model-*"))
    assert VerifierWeights(lora).lm_head().shape[0] == load_config(lora).vocab_size


def test_a_full_disk_is_told_and_nothing_is_left(lora, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(adapters, "commit", full)
    with pytest.raises(ValueError, match=r"cannot be written .*No space left.*: make room there"):
        verifier_location(lora)
    assert [file.name for file in Path(lora.merged_dir).iterdir() if not file.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a folder nor a reachable hub id"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: rename(folder, "self_attn", "attention"), "cannot be merged into .*missing adapter keys"),
        (lambda folder: edit(folder, r=8), "cannot be merged into .*size mismatch"),
        (lambda folder: edit(folder, target_modules=["qkv"]), "cannot be merged into"),
        (lambda folder: edit(folder, task_type="SEQ_CLS"), "must be of a language model .* has task_type SEQ_CLS"),
        (lambda folder: (folder / "adapter_model.safetensors").write_text("git-lfs"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    ],
)
def test_one_that_does_not_fit_is_refused(lora, change, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change(Path(lora.adapter))
    with pytest.raises(ValueError, match=message):
        verifier_location(lora)


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def edit(folder: Path, file: str = "adapter_config.json", **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_no_change_of_weights_is_refused(lora, tmp_path):
    kind = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    prompt = make_adapter(Path(lora.path), tmp_path / "prompt", kind)
    with pytest.raises(ValueError, match="cannot be merged into"):
        verifier_location(replace(lora, adapter=str(prompt)))


def test_a_layer_that_is_both_ends_of_a_model_is_refused(lora, tmp_path):
    tied = tmp_path / "tied"
    shutil.copytree(lora.path, tied)
    edit(tied, file="config.json", tie_word_embeddings=True)
    weights = load_file(tied / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, tied / "model.safetensors"
    )
    kind = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    made = make_adapter(tied, tmp_path / "of_tied", kind)
    with pytest.raises(ValueError, match=r"cannot be merged into .*tie_word_embeddings"):
        verifier_location(replace(lora, path=str(tied), adapter=str(made)))


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_a_quantised_verifier_is_refused(lora, tmp_path, file):
    quantised = tmp_path / "quantised"
    shutil.copytree(lora.path, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / file).write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="whose weights are quantised"):
        verifier_location(replace(lora, path=str(quantised)))


def test_a_verifier_that_lacks_weights_is_refused(lora, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(lora.path, part)
    weights = load_file(part / "model.safetensors")
    name = next(name for name in weights if "mlp.down_proj" in name)
    save_file({other: tensor for other, tensor in weights.items() if other != name}, part / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no weights for .*down_proj"):
        verifier_location(replace(lora, path=str(part)))


def test_jobs_serve_the_merged_folder_and_containers_have_it(lora, tmp_path):
    options = [
        f"verifier.path={lora.path}",
        f"verifier.adapter={lora.adapter}",
        "name=one",
        f"runs_dir={tmp_path}/runs",
    ]
    options += ["cluster=slurm_gpu", "cluster.server.kind=vllm", "cluster.container.kind=pyxis"]
    config = composed(*options)
    jobs = {job.stage: job.text for job in render_jobs(config, tmp_path / "jobs")}
    assert verifier_location(config.verifier, make=False) in jobs[SERVER]
    assert not (tmp_path / "runs" / "merged").exists(), "job files alone, as of a dry run, merge nothing"
    assert {lora.adapter, lora.path, str(tmp_path / "runs")} <= set(mounted_paths(config))


def test_a_run_with_an_adapter(finished, lora, tmp_path):
    run = Run(tmp_path / "runs", finished.verifier)
    said = run("run", f"verifier.adapter={lora.adapter}", "name=tuned").stdout
    assert said.count("merges") == 1, "by the first of its processes"
    folder = tmp_path / "runs" / "tuned"
    store, known = HiddenStateStore(folder / "hidden_states"), replace(lora, merged_dir=str(tmp_path / "runs/merged"))
    assert store.manifest["verifier_adapter"] == lora.adapter
    assert store.manifest["settings"]["verifier"] == verifier_identity(known)
    exported = json.loads((folder / "exports/plain/fledge.json").read_text())
    assert exported["verifier"] == verifier_identity(known)
    assert verifier_location(known) in (folder / "exports/plain/SERVING.md").read_text()
    refused = run("evaluate", "name=tuned", "overwrite=true", code=2).stderr
    assert "belongs to another verifier" in refused
