"""`fledge adapt`: a head goes on with other texts, and what it gained and lost is said."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from builders import Run, as_if_killed_after, composed
from commands import run_command
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.schema import StoreConfig, VerifierConfig
from fledge.data_synthesis.heldout import is_heldout
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.eval.adapt import _seen, _steps_between
from fledge.models.formats.plain import load_head
from fledge.models.formats.training_folder import head_folder, read_walks
from fledge.models.verifier.weights import verifier_identity
from safetensors.torch import load_file, save_file


def test_a_head_goes_on_with_texts_of_ones_own_and_the_report_says_what_it_gained_and_lost(finished, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    texts = (f"How long do I cook {n} eggs?" for n in range(2, 42))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = [
        f"adapt.head={finished.path}",
        f"adapt.replay=[{{folder: {finished.path / 'hidden_states'}, weight: 0.3}}]",
        *(f"data.sources=[{{path: {prompts}}}]", "data.heldout_share=0.4", "draft.vocab_size=200"),
        *("train.max_steps=8", "train.save_every=4", "train.lr=1e-3", "adapt.max_forgetting=null"),
    ]
    run = Run(tmp_path / "runs", finished.verifier)
    refused = run("adapt", *options, code=2)
    assert "draft must describe the head at adapt.head: set draft.vocab_size=300" in refused.stderr
    assert not (run.path / "conversations").exists(), "before the verifier answers"
    options.remove("draft.vocab_size=200")
    run.options = ["draft.vocab_size=300"]
    said = run("adapt", *options, "overwrite=true").stdout
    report = (run.path / "adaptation.md").read_text()
    assert report in said
    assert "0 hold answers that the verifier would hardly have written" in report
    assert re.findall("## (.*):", report) == ["Its own texts", "What it could before"]
    training = run.path / "training" / "checkpoints"
    before, after = (read_walks(training / name)[3] for name in ("step-0", (training / "best").read_text().strip()))
    own = {name for name in before if name.startswith("mine/")}
    lengths = (acceptance_length(read_walks(training / f"step-{step}")[3], own) for step in (0, 4, 8))
    assert acceptance_length(after, own) == max(lengths), "though there is no floor, its own texts tell the best one"
    for ids in (own, before.keys() - own):
        for walk in (before, after):
            assert f"{acceptance_length(walk, ids):.3f}" in report
    weights = load_head(run.path / "exports" / "plain")[0].state_dict()
    assert weights["fc.weight"].shape == load_head(training / "step-8")[0].fc.weight.shape
    as_if_killed_after(run, 4)
    shutil.rmtree(run.path / "exports")
    again = run("adapt", *options)
    assert "going on from step 4" in again.stdout
    assert (run.path / "adaptation.md").read_text() == report


def acceptance_length(walk: dict, ids: set[str]) -> float:
    rounds, accepted = (sum(walk[name][what] for name in ids) for what in ("rounds", "accepted"))
    return 1 + accepted / rounds


def test_a_head_goes_on_with_a_verifier_that_was_tuned(finished, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(finished.verifier, tuned)
    weights = load_file(tuned / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.5.mlp.down_proj.weight"))
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(weights[name].shape, generator=generator) * weights[name].std() * 0.3
    save_file(weights | {name: weights[name] + shift}, tuned / "model.safetensors", {"format": "pt"})
    run = Run(tmp_path / "runs", tuned)
    export = finished.path / "exports" / "plain"
    options = [f"adapt.head={export}", "train.max_steps=4", "train.save_every=2", "train.lr=1e-3"]
    said = run("adapt", *options, "train.lora_rank=4").stdout
    assert "- kept: step-" in said
    assert f"fingerprint {verifier_identity(VerifierConfig(str(tuned)))['fingerprint']}" in said
    assert re.findall("## (.*):", (run.path / "adaptation.md").read_text()) == ["Its own texts"]
    recorded = (json.loads((r.path / "exports/plain/fledge.json").read_text())["verifier"] for r in (run, finished))
    assert len({one["fingerprint"] for one in recorded}) == 2, "the export names the verifier that it was adapted to"
    start, _ = load_head(run.path / "training" / "checkpoints" / "step-0")
    assert torch.equal(start.fc.weight, load_head(export)[0].fc.weight)
    end, _ = load_head(run.path / "training" / "checkpoints" / "step-4")
    assert not torch.equal(start.fc.weight, end.fc.weight)
    assert torch.equal(start.norm.weight, end.norm.weight)


def test_it_measures_ten_times_unless_it_is_told_when(finished):
    config = composed(*finished.arguments("train.max_steps=null", "train.epochs=5", "train.packs_per_step=2"))
    stores, opened = [StoreConfig("own"), StoreConfig("more", 0.5)], [HiddenStateStore(config.hidden_states_folder)] * 2
    tokens = read_manifest(config.hidden_states_folder, "hidden_states")["counts"]["tokens"]
    steps = 5 / (2 * config.train.batch_tokens) / 10
    assert _steps_between(config, stores, opened) == round(1.5 * tokens * steps) > 1
    stores[1].limit = len(opened[1]) // 10
    assert _steps_between(config, stores, opened) == pytest.approx((1 + 0.05) * tokens * steps, abs=1)
    config.train.max_steps = 7
    assert _steps_between(config, stores, opened) == 1


def prompts_of(tmp_path, name: str, texts: list[str]) -> str:
    """Write prompts; return the source."""
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return f"{{path: {file}}}"


def test_what_ends_a_training_that_forgets_stands_in_the_report_and_each_source_has_its_row(finished, tmp_path):
    sources = [
        prompts_of(tmp_path, name, [f"{text} {n}?" for n in range(40)])
        for name, text in (("eggs", "How long do I cook eggs, number"), ("trains", "When does train"))
    ]
    options = [
        f"adapt.head={finished.path}",
        f"adapt.replay=[{{folder: {finished.path / 'hidden_states'}, weight: 0}}]",
        *(f"data.sources=[{','.join(sources)}]", "data.heldout_share=0.3", "train.max_steps=40"),
        *("train.save_every=4", "train.lr=0.03", "adapt.max_forgetting=0.02"),
    ]
    run = Run(tmp_path / "runs", finished.verifier)
    report = run("adapt", *options).stdout
    assert "- ended: another store lost " in report
    manifest = read_manifest(run.path / "training", "training")
    assert manifest["steps"] < 40
    last = read_metrics(run)[-1]
    assert f"- trained: {manifest['steps']} steps, {manifest['tokens']:,} tokens" in report
    assert manifest["tokens"] == last["train/tokens"] > 0
    best = (run.path / "training" / "checkpoints" / "best").read_text().strip()
    assert f"- kept: {best}" in report
    stays = "The head stays as it was: no checkpoint that may be kept accepts more"
    assert (stays in report) == (best == "step-0")
    assert re.search(rf"at the end \| +step-{manifest['steps']} ", report), "what it would have been"
    of_sources = report.split("By source, greedy")[1].split("## ")[0]
    assert re.findall(r"^\| ([\w/]+) +\|", of_sources, re.MULTILINE)[1:] == ["eggs/train", "trains/train"]


def read_metrics(run: Run) -> list[dict]:
    lines = (run.path / "training" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "train/tokens" in (record := json.loads(line))]


def test_what_it_is_measured_on_may_have_been_trained_on(finished, tmp_path):
    config = composed(*finished.arguments())
    store = HiddenStateStore(config.hidden_states_folder)
    config.data.heldout_share = share = store.manifest["settings"]["heldout_share"]
    trained = {name for name in store.ids if not is_heldout(name, share)}
    replay = [StoreConfig(str(store.folder), 0.5)]
    assert re.match(rf"{len(trained)} of the {len(trained)} held-out", _seen([store, store], replay, trained)[0])
    assert _seen([store, store], replay, set(store.ids) - trained) == []
    assert _seen([store, store], [StoreConfig(str(store.folder), 0)], trained) == [], "it is measured alone"


def test_it_goes_on_when_the_head_that_it_started_from_is_gone(finished, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(finished.path / "training", source / "training")
    run = Run(tmp_path / "runs", finished.verifier)
    options = [f"adapt.head={source}", "train.max_steps=4", "train.save_every=2", "data.heldout_share=0.3"]
    report = run("adapt", *options).stdout
    as_if_killed_after(run, 2)
    (source / "training" / "checkpoints" / "best").write_text("step-6\n")
    assert "going on from step 2" in run("adapt", *options).stdout, "its best is another one by now"
    as_if_killed_after(run, 2)
    shutil.rmtree(source)
    again = run("adapt", *options).stdout
    assert again.count("going on from step 2") == 1
    assert report.split("# Adaptation")[1] == again.split("# Adaptation")[1]
    exported = json.loads((run.path / "exports" / "plain" / "fledge.json").read_text())
    assert exported["started_from"] == f"other/{head_folder(None, finished.path / 'training').name}"
    card = (run.path / "exports" / "plain" / "README.md").read_text()
    assert f"from `{exported['started_from']}` on" in card
    another = tmp_path / "another"  # whose best checkpoint has the same name
    shutil.copytree(finished.path / "training", another / "training")
    best = head_folder(None, another / "training")
    earlier = next(path for path in best.parent.glob("step-*") if path != best)
    shutil.copy(earlier / "model.safetensors", best)
    assert "other settings" in run("adapt", f"adapt.head={another}", *options[1:], code=2).stderr


def test_what_adapt_needs_is_asked_for(finished, tmp_path):
    for options, error in (
        ([], "adapt.head is required"),
        ([f"adapt.head={finished.path}", "data.heldout_share=0"], "data.heldout_share must be above 0"),
        ([f"adapt.head={tmp_path}"], "config.json"),
        ([f"adapt.head={finished.path}", "data.limit=8", "data.heldout_share=0.1"], "raise data.heldout_share or"),
        ([f"adapt.head={finished.path}", "train.patience=2"], "adapt sets train.patience itself"),
        ([f"adapt.head={finished.path}", "verifier.tensor_parallel=true"], "verifier.tensor_parallel must be false"),
        ([f"adapt.head={tmp_path / 'run'}"], "is of this very run"),
        ([f"adapt.head={finished.path}", f"adapt.replay=[{{folder: {tmp_path}}}]"], "manifest.json"),
    ):
        done = run_command(finished.command("adapt", f"runs_dir={tmp_path}", *options))
        assert done.returncode == 2, done.stderr
        assert error in done.stderr
        assert not (tmp_path / "run" / "conversations").exists(), "before the verifier answers"
