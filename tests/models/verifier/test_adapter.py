"""A verifier with a PEFT adapter: merged once, and read like any other."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import Run, composed
from commands import fledge
from fledge.conf.schema import Dtype, VerifierConfig
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.models.verifier import adapter as adapters
from fledge.models.verifier.config import load_config, load_tokenizer, verifier_location
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import VerifierWeights, verifier_identity
from fledge.slurm.jobs.render import mounted_paths, served_model
from huggingface_hub import constants
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
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
def lora(tiny_verifier_folder, tmp_path, monkeypatch) -> VerifierConfig:
    """The tiny verifier with a LoRA adapter; what is merged lies in a folder of the test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    adapters.merged_folder.cache_clear()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made = make_adapter(tiny_verifier_folder, tmp_path / "adapter", config)
    return VerifierConfig(str(tiny_verifier_folder), adapter=str(made), dtype=Dtype.float32)


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


def test_it_is_merged_once_and_named_by_what_is_in_it(lora, capsys):
    folder = Path(verifier_location(lora))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    adapters.merged_folder.cache_clear()  # as in another process
    assert Path(verifier_location(lora)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("merges") == 1
    assert verifier_identity(lora)["fingerprint"] != verifier_identity(replace(lora, adapter=None))["fingerprint"]
    tokenizers = [load_tokenizer(config) for config in (lora, replace(lora, adapter=None))]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert load_config(lora).hidden_size == load_config(replace(lora, adapter=None)).hidden_size
    weights = Path(lora.adapter) / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    adapters.merged_folder.cache_clear()
    assert Path(verifier_location(lora)) != folder, "an adapter that was trained on is merged anew"


def test_processes_that_begin_together_merge_once(lora, capsys):
    found: list[str] = []
    merge = adapters.merged_folder.__wrapped__
    started = [
        threading.Thread(target=lambda: found.append(str(merge(lora.path, None, lora.adapter)))) for _ in range(3)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert found == [found[0]] * 3
    assert capsys.readouterr().out.count("merges") == 1


def test_a_merge_that_was_killed_is_made_again(lora, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    commit = adapters.commit
    monkeypatch.setattr(adapters, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        verifier_location(lora)
    monkeypatch.setattr(adapters, "commit", commit)
    assert VerifierWeights(lora).lm_head().shape[0] == load_config(lora).vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a folder nor a reachable hub id"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: rename(folder, "self_attn", "attention"), "cannot be merged into .*missing adapter keys"),
        (lambda folder: edit(folder, r=8), "cannot be merged into .*size mismatch"),
        (lambda folder: edit(folder, target_modules=["qkv"]), "cannot be merged into"),
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


def edit(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_is_no_change_of_weights_is_refused(lora, tmp_path):
    kind = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    prompt = make_adapter(Path(lora.path), tmp_path / "prompt", kind)
    with pytest.raises(ValueError, match="cannot be merged into"):
        verifier_location(replace(lora, adapter=str(prompt)))


def test_a_quantised_verifier_is_refused(lora, tmp_path):
    quantised = tmp_path / "quantised"
    shutil.copytree(lora.path, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="whose weights are quantised"):
        verifier_location(replace(lora, path=str(quantised)))


def test_jobs_serve_the_merged_folder_and_containers_have_it(lora):
    config = composed(f"verifier.path={lora.path}", f"verifier.adapter={lora.adapter}", "name=one")
    merged = verifier_location(lora)
    assert served_model(config) == merged
    assert {merged, lora.adapter, lora.path} <= set(mounted_paths(config))


def test_a_run_with_an_adapter(finished, lora, tmp_path):
    run = Run(tmp_path / "runs", finished.verifier)
    arguments = run.arguments(f"verifier.adapter={lora.adapter}", "name=tuned")
    done = fledge("run", *arguments, HF_HOME=constants.HF_HOME)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.count("merges") == 1, "by the first of its processes"
    folder = tmp_path / "runs" / "tuned"
    store = HiddenStateStore(folder / "hidden_states")
    assert store.manifest["verifier_adapter"] == lora.adapter
    assert store.manifest["settings"]["verifier"] == verifier_identity(lora)
    exported = json.loads((folder / "exports/plain/fledge.json").read_text())
    assert exported["verifier"]["fingerprint"] == verifier_identity(lora)["fingerprint"]
    assert verifier_location(lora) in (folder / "exports/plain/SERVING.md").read_text()
    refused = run("evaluate", "name=tuned", "overwrite=true", code=2).stderr
    assert "belongs to another verifier" in refused
