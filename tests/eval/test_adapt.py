"""`fledge adapt`: a head goes on with other texts, and what it gained and lost is said."""

from __future__ import annotations

import json
import re
import shutil

import torch
from builders import Run, as_if_killed_after, composed
from commands import run_command
from fledge.conf.runtime.artifact import read_manifest
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.eval.adapt import _steps_between
from fledge.models.formats.plain import load_head
from fledge.models.formats.training_folder import read_walks
from safetensors.torch import load_file, save_file


def test_a_head_goes_on_with_texts_of_ones_own_and_the_report_says_what_it_gained_and_lost(finished, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    texts = (f"How long do I cook {n} eggs?" for n in range(2, 42))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = [
        f"adapt.head={finished.path}",
        f"adapt.replay=[{{folder: {finished.path / 'hidden_states'}, weight: 0.3}}]",
        *(f"data.sources=[{{path: {prompts}}}]", "data.heldout_share=0.4", "draft.vocab_size=200"),
        *("train.max_steps=8", "train.save_every=4", "train.lr=1e-3", "adapt.max_forgetting=1"),
    ]
    run = Run(tmp_path / "runs", finished.verifier)
    refused = run("adapt", *options, code=2)
    assert "draft must describe the head at train.init_from" in refused.stderr, "what was typed is not overruled"
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
    for ids in (own, before.keys() - own):
        for walk in (before, after):
            rounds, accepted = (sum(walk[name][what] for name in ids) for what in ("rounds", "accepted"))
            assert f"{1 + accepted / rounds:.3f}" in report
    weights = load_head(run.path / "exports" / "plain")[0].state_dict()
    assert weights["fc.weight"].shape == load_head(training / "step-8")[0].fc.weight.shape
    as_if_killed_after(run, 4)
    shutil.rmtree(run.path / "exports")
    again = run("adapt", *options)
    assert "going on from step 4" in again.stdout
    assert (run.path / "adaptation.md").read_text() == report


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
    assert "The best checkpoint is step-" in run("adapt", *options).stdout
    assert re.findall("## (.*):", (run.path / "adaptation.md").read_text()) == ["Its own texts"]
    recorded = (json.loads((r.path / "exports/plain/fledge.json").read_text())["verifier"] for r in (run, finished))
    assert len({one["fingerprint"] for one in recorded}) == 2, "the export names the verifier that it was adapted to"
    start, _ = load_head(run.path / "training" / "checkpoints" / "step-0")
    assert torch.equal(start.fc.weight, load_head(export)[0].fc.weight)


def test_it_measures_ten_times_unless_it_is_told_when(finished):
    config = composed(*finished.arguments("train.max_steps=null", "train.epochs=5", "train.packs_per_step=2"))
    weights, stores = [1.0, 0.5], [HiddenStateStore(config.hidden_states_folder)] * 2
    tokens = read_manifest(config.hidden_states_folder, "hidden_states")["counts"]["tokens"]
    assert _steps_between(config, weights, stores) == round(1.5 * tokens * 5 / (2 * config.train.batch_tokens) / 10) > 1
    config.train.max_steps = 7
    assert _steps_between(config, weights, stores) == 1


def test_what_adapt_needs_is_asked_for(finished, tmp_path):
    for options, error in (
        ([], "adapt.head is required"),
        ([f"adapt.head={finished.path}", "data.heldout_share=0"], "data.heldout_share must be above 0"),
        ([f"adapt.head={tmp_path}"], "config.json"),
        ([f"adapt.head={finished.path}", "data.limit=8", "data.heldout_share=0.1"], "raise data.heldout_share or"),
    ):
        done = run_command(finished.command("adapt", f"runs_dir={tmp_path}", *options))
        assert done.returncode == 2, done.stderr
        assert error in done.stderr
