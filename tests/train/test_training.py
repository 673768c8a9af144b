"""Training: resumed equals uninterrupted; many processes equal one; curves are told truly."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from builders import (
    OF_THE_MACHINE,
    Run,
    as_if_killed_after,
    assert_same_record,
    copy_parts,
    metrics_of,
    write_store,
)
from fledge.models.formats.plain import load_head
from fledge.models.head.draft_head import of_width
from fledge.models.verifier.weights import VerifierWeights
from fledge.train.metrics.tracking import read_metrics
from safetensors.torch import load_file


def optimizer_state(checkpoint) -> list[torch.Tensor]:
    """Every tensor that DeepSpeed saved of the optimizer, in a fixed order."""
    tensors: list[torch.Tensor] = []

    def collect(value) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, list | tuple):
            for entry in value:
                collect(entry)

    for path in sorted(checkpoint.glob("*optim_states.pt")):
        collect(torch.load(path, weights_only=False)["optimizer_state_dict"])
    return tensors


DEEP = ("draft.num_layers=3", "draft.norm_before_fc=true", "draft.attention_bias=true", "draft.qk_norm=true")
MUON = ("train.optimizer=muon", "train.muon_lr=2e-3", "train.weight_decay=0.1", "train.packs_per_step=2")


@pytest.mark.parametrize(
    ("zero_stage", "loss", "form", "processes"),
    [
        (1, "kl", (), 1),
        (3, "lk_lambda", DEEP, 1),
        pytest.param(1, "kl", MUON, 2, marks=pytest.mark.slow),
        (3, "kl", MUON, 2),
        pytest.param(1, "kl", DEEP, 1, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished, run, tmp_path, zero_stage, loss, form, processes
):
    options = [f"deepspeed.zero_stage={zero_stage}", f"train.loss={loss}", *form]
    copy_parts(finished, run)
    run("train", *options, processes=processes)
    whole = run.path / "training"
    resumed = Run(tmp_path / "resumed", run.verifier)
    copy_parts(finished, resumed)
    shutil.copytree(whole, resumed.path / "training")
    as_if_killed_after(resumed, 9)
    done = resumed("train", *options, processes=processes)
    assert "going on from step 9" in done.stdout

    first, second = (folder / "training" / "checkpoints" / "step-24" for folder in (run.path, resumed.path))
    weights, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    states, states_again = optimizer_state(first), optimizer_state(second)
    assert len(states) > 2
    assert all(torch.equal(a, b) for a, b in zip(states, states_again, strict=True))
    assert torch.equal(torch.load(first / "rng-0.pt")["cpu"], torch.load(second / "rng-0.pt")["cpu"])

    assert metrics_of(run) == metrics_of(resumed), "same steps, none lost or doubled"
    assert [r["step"] for r in metrics_of(run)] == [6, 9, 9, 12, 12, 18, 18, 24, 24]


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_processes_that_read_a_mix_change_nothing_and_end_with_a_killed_trainer(finished, run, tmp_path):
    folder = finished.path / "hidden_states"
    masks = {f"other/{n}": "0" * 9 + "1" * (5 + n) for n in range(31)}
    other = write_store(tmp_path / "other", folder, masks, share=0.2)
    mix = f"train.stores=[{{folder:{folder},weight:0.5}},{{folder:{other},weight:2}}]"
    options = [mix, "train.batch_tokens=128", "train.save_every=12"]
    run("train", *options, "train.data_workers=0")
    killed = Run(tmp_path / "killed", run.verifier)
    training = subprocess.Popen(  # whose helper processes are counted
        killed.command("train", *options, "train.data_workers=2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    readers: list[int] = []
    while training.poll() is None and not (killed.path / "training" / "checkpoints" / "step-12").exists():
        readers = children(training.pid) or readers
        time.sleep(0.002)
    training.kill()
    assert training.wait() == -signal.SIGKILL
    assert len(readers) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{reader}").exists() for reader in readers):
        assert time.monotonic() < deadline, "processes that read stay behind"
        time.sleep(0.02)
    assert "going on from step 12" in killed("train", *options, "train.data_workers=2").stdout

    first, second = (r.path / "training" / "checkpoints" / "step-24" for r in (run, killed))
    weights, again = (load_file(checkpoint / "model.safetensors") for checkpoint in (first, second))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics_of(run) == metrics_of(killed)
    refused = run("train", mix.replace("0.5", "1.5"), *options[1:], code=2).stderr
    assert refused.count("\n") == 1
    assert "hidden_states: [" in refused
    assert "1.5" in refused


SPREAD = ("train.packs_per_step=4", "train.loss=lk_lambda", "train.max_steps=12")  # KL, alpha, a memory over steps


@pytest.fixture(scope="module")
def alone(finished, tmp_path_factory) -> list[dict]:
    """Curve of one process that accumulates four packs a step."""
    run = copy_parts(finished, Run(tmp_path_factory.mktemp("alone"), finished.verifier))
    run("train", *SPREAD)
    return metrics_of(run)


@pytest.mark.parametrize(
    ("zero_stage", "processes"),
    [pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow), (3, 2)],
)
def test_processes_give_the_curve_of_one_that_accumulates(finished, run, alone, zero_stage, processes):
    copy_parts(finished, run)
    run("train", *SPREAD, f"deepspeed.zero_stage={zero_stage}", processes=processes)
    for ours, theirs in zip(metrics_of(run), alone, strict=True):
        assert_same_record(ours, theirs)
    _, record = load_head(run.path / "training" / "checkpoints" / "step-12")
    assert record["step"] == 12


def test_training_lowers_the_loss_and_records_every_metric(finished):
    records = read_metrics(finished.path / "training")
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    trained = next(r for r in records if "train/loss" in r)
    for name in ("kl", "agreement", "prefix_agreement", "overlap"):
        assert {f"train/{name}_step_{k}" for k in range(3)} <= trained.keys()
    assert (
        OF_THE_MACHINE | {"train/lr", "train/grad_norm", "train/outside_draft_vocab", "train/epoch"} <= trained.keys()
    )
    for record in records:
        if "train/loss" in record:
            assert record["train/tokens_per_s"] > 0
            assert record["train/memory_gib"] > 0.05
            assert 0 < record["train/utilisation"] < 10
            assert 0 < record["train/data_wait_share"] < 1
    heldout = [r for r in records if "heldout/acceptance_length_3" in r]
    assert [r["step"] for r in heldout] == [9, 12, 18, 24]
    for record in heldout:
        assert 1 < record["heldout/acceptance_length_t1_3"] < 4


def test_a_head_begins_as_a_layer_of_the_verifier_and_the_settings_of_others_do_not_say_how(
    finished, run, verifier_config
):
    copy_parts(finished, run)
    run("train", "train.init=layers", "train.lr=1e-30", "train.max_steps=1")
    head, _ = load_head(run.path / "training" / "checkpoints" / "step-1")
    of_verifier = VerifierWeights(verifier_config).layer(7, "", {"mlp.up_proj"})["mlp.up_proj.weight"]
    assert torch.equal(head.layers[0].mlp.up_proj.weight, of_verifier)
    ours, theirs = (json.loads((r.path / "training" / "manifest.json").read_text()) for r in (run, finished))
    assert ours["settings"]["train"]["init"] == "layers"
    assert theirs["settings"]["train"].keys().isdisjoint({"init", "init_layer", "optimizer", "muon_lr"})


def test_a_frozen_lm_head_stays_the_verifiers(finished, run, verifier_config):
    copy_parts(finished, run)
    run("train", "draft.train_lm_head=false", "train.max_steps=2")
    head, _ = load_head(run.path / "training" / "checkpoints" / "step-2")
    assert torch.equal(head.lm_head.weight, VerifierWeights(verifier_config).lm_head()[head.target_ids])


def test_a_full_vocabulary_with_a_frozen_lm_head_is_the_verifiers_own(finished, run, verifier_config):
    copy_parts(finished, run)
    for stage in ("dump", "train", "evaluate"):
        run(stage, "draft.train_lm_head=false", "draft.vocab_size=null", "evaluate.baselines=false")
    head, _ = load_head(run.path / "training" / "checkpoints" / "step-24")
    assert torch.equal(head.lm_head.weight, VerifierWeights(verifier_config).lm_head())
    assert json.loads((run.path / "evaluation" / "acceptance.json").read_text())["acceptance_length"] > 1.2


@pytest.mark.parametrize(("width", "zero_stage"), [(48, 3), (80, 1)])
def test_a_head_of_another_width_trains_an_embedding_of_its_own(finished, run, verifier_config, width, zero_stage):
    copy_parts(finished, run)
    options = [f"draft.hidden_size={width}", f"deepspeed.zero_stage={zero_stage}", "evaluate.baselines=false"]
    for stage in ("train", "evaluate"):
        run(stage, *options)
    head, _ = load_head(run.path / "training" / "checkpoints" / "step-24")
    start = of_width(VerifierWeights(verifier_config).embedding(), width)
    assert head.embed_tokens.weight.shape == start.shape
    assert not torch.equal(head.embed_tokens.weight, start)
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    assert results["acceptance_length"] > 1.2
    run("train", "draft.hidden_size=48", "draft.train_lm_head=false", "overwrite=true", code=2)


@pytest.mark.parametrize("loss", ["lk_lambda", "acceptance_length"])
def test_losses_that_blend_remember_acceptance_and_train_with_recomputed_steps_at_zero_3(finished, run, loss):
    copy_parts(finished, run)
    options = [f"train.loss={loss}", "train.checkpoint_activations=true", "deepspeed.zero_stage=3"]
    run("train", *options, "train.max_steps=12")
    records = [r for r in read_metrics(run.path / "training") if "train/loss" in r]
    assert records[-1]["train/kl_step_0"] < records[0]["train/kl_step_0"]
    state = json.loads((run.path / "training" / "checkpoints" / "step-12" / "trainer.json").read_text())
    assert all(0 < value < 1 for value in state["acceptance"])


def test_bfloat16_trains_at_zero_2(finished, run):
    copy_parts(finished, run)
    run("train", "train.dtype=bfloat16", "deepspeed=zero2")
    losses = [r["train/loss"] for r in read_metrics(run.path / "training") if "train/loss" in r]
    assert losses[-1] < 0.5 * losses[0]


def test_loss_and_gradient_do_not_depend_on_how_samples_are_packed(finished, run, tmp_path):
    """One optimizer step takes the whole store, once in few packs and once with a sample or two in each."""
    curves = []
    for tokens, here in ((1024, run), (160, Run(tmp_path / "one by one", run.verifier))):
        copy_parts(finished, here)
        options = [f"train.batch_tokens={tokens}", "train.max_steps=1"]
        announced = here("train", *options).stdout
        assert "(0 longer than a pack cut" in announced
        packs = int(re.search(r"\((\d+) packs an epoch\)", announced)[1])
        here("train", *options, f"train.packs_per_step={packs}", "overwrite=true")
        curves.append((packs, metrics_of(here)[0]))
    (few, packed), (many, apart) = curves
    assert many > 4 * few
    assert_same_record(packed, apart)
    assert packed["train/grad_norm"] > 0


def test_training_ends_when_other_stores_lose_too_much_and_the_best_checkpoint_is_within_that(finished, run, tmp_path):
    """The head is trained on tokens without sense; what it could is measured on those that it was trained for."""
    copy_parts(finished, run)
    masks = {f"nonsense/{n}": "0" * 6 + "1" * 30 for n in range(40)}
    nonsense, before = run.path / "nonsense", finished.path / "training" / "checkpoints" / "step-24"
    write_store(nonsense, run.path / "hidden_states", masks, 0.25)
    options = [
        f"train.stores=[{{folder: {nonsense}}}, {{folder: {run.path / 'hidden_states'}, weight: 0}}]",
        *(f"train.init_from={before}", "train.max_forgetting=0.1", "train.lr=2e-3"),
        *("train.save_every=2", "train.heldout_every=1", "train.keep_checkpoints=1"),
    ]
    said = run("train", *options).stdout
    assert "than train.max_forgetting" in said
    training = run.path / "training"
    manifest = json.loads((training / "manifest.json").read_text())
    end = manifest["steps"]
    assert manifest["complete"]
    assert manifest["ended"] in said
    assert 0 < end < 24
    general = {
        r["step"]: r["heldout_store_1/acceptance_length_3"] for r in metrics_of(run) if "heldout_store_1" in str(r)
    }
    assert general[0] - general[end] > 0.1, "what ended it"
    best = int((training / "checkpoints" / "best").read_text().removeprefix("step-"))
    assert best < end
    assert general[0] - general[best] <= 0.1
    assert {path.name for path in (training / "checkpoints").glob("step-*")} == {
        "step-0",
        f"step-{best}",
        f"step-{end}",
    }

    resumed = Run(tmp_path / "resumed", run.verifier)
    shutil.copytree(run.path, resumed.path)
    as_if_killed_after(resumed, 0)
    assert "going on" not in resumed("train", *options).stdout, "it is at step 0"
    weights, again = (
        load_file(r.path / "training/checkpoints" / f"step-{end}/model.safetensors") for r in (run, resumed)
    )
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert "is complete" in run("train", *options).stdout


@pytest.mark.parametrize(("zero_stage", "optimizer"), [(1, "adamw"), (3, "muon")])
def test_lora_changes_matrices_by_its_rank_and_every_checkpoint_has_it_merged(
    finished, run, tmp_path, zero_stage, optimizer
):
    start = finished.path / "training" / "checkpoints" / "step-24"
    copy_parts(finished, run)
    options = [f"train.init_from={start}", f"deepspeed.zero_stage={zero_stage}", f"train.optimizer={optimizer}"]
    options += ["train.lora_rank=2", "train.lr=2e-2"]
    done = run("train", *options, "train.checkpoint_activations=true")
    trained, every = map(float, re.search(r"train: ([\d.]+) of ([\d.]+) M parameters", done.stdout).groups())
    assert trained < every / 4
    last = run.path / "training" / "checkpoints" / "step-24"
    before, after = (load_file(folder / "model.safetensors") for folder in (start, last))
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith("fc.") or "_proj." in name}
    assert {int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)) for name in changed} == {2}

    as_if_killed_after(run, 9)
    assert "going on from step 9" in run("train", *options).stdout
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)

    merged = copy_parts(finished, Run(tmp_path / "merged", run.verifier))
    merged("train", f"train.init_from={last}", "train.max_steps=1")
    (_, measured), (_, served) = map(load_head, (last, merged.path / "training" / "checkpoints" / "step-0"))
    assert measured["heldout"] == pytest.approx(served["heldout"], abs=1e-4)
    assert "train.init_from is required with train.lora_rank" in merged("train", "train.lora_rank=2", code=2).stderr


def test_training_ends_after_checkpoints_that_are_no_better(finished, run):
    copy_parts(finished, run)
    options = ["train.lr=1e-30", "train.save_every=2", "train.patience=2"]
    run("train", *options)
    training = run.path / "training"
    assert json.loads((training / "manifest.json").read_text())["steps"] == 6
    assert (training / "checkpoints" / "best").read_text().strip() == "step-2"
    as_if_killed_after(run, 4)
    assert "going on from step 4" in run("train", *options).stdout
    assert json.loads((training / "manifest.json").read_text())["steps"] == 6
    store = f"train.stores=[{{folder: {run.path / 'hidden_states'}, weight: 0}}]"
    refused = [
        ("train.max_forgetting=0.1", "train.init_from and two train.stores or more are required"),
        (store, "train.stores must have a weight above 0"),
    ]
    for option, error in refused:
        assert error in run("train", option, "overwrite=true", code=2).stderr
