"""Training that is stopped, moved, or meets bad numbers and full disks: it goes on, or says what is wrong."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import time

import pytest
import torch
from builders import Run, as_if_killed_after, assert_same_record, copy_parts, make_head, metrics_of
from commands import popen
from fledge.conf.schema import Config, DraftConfig
from fledge.models.formats.plain import load_head, save_head
from fledge.models.formats.training_folder import checkpoint_steps, head_folder
from fledge.train import setup
from safetensors.torch import load_file


def checkpoints(run: Run):
    return run.path / "training" / "checkpoints"


def weights(run: Run, step: int = 24) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run) / f"step-{step}" / "model.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_checkpoint_and_changes_nothing_else(finished, run, number, code):
    copy_parts(finished, run)
    stage = "run" if number == signal.SIGUSR1 else "train"  # `fledge run` passes it on
    command = run.command(stage, "train.save_every=24", "train.log_every=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while len(metrics_of(run)) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by {number.name}, step" in output
    [stopped] = checkpoint_steps(checkpoints(run))
    assert 4 <= stopped < 24
    assert not json.loads((checkpoints(run) / f"step-{stopped}" / "heldout_walks.json").read_text()), "not walked there"
    done = run("train")
    assert f"going on from step {stopped}" in done.stdout
    ours, theirs = weights(run), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("zero_stage", "processes", "optimizer"),
    [
        pytest.param(2, (1, 2), "adamw", marks=pytest.mark.slow),
        (3, (2, 1), "adamw"),
        (2, (2, 1), "muon"),
        pytest.param(3, (2, 1), "muon", marks=pytest.mark.slow),
    ],
)
def test_training_moves_to_another_number_of_processes(finished, run, tmp_path, zero_stage, processes, optimizer):
    copy_parts(finished, run)
    options = [f"deepspeed.zero_stage={zero_stage}", "train.packs_per_step=2", f"train.optimizer={optimizer}"]
    run("train", *options, processes=processes[0])
    moved = Run(tmp_path / "moved", run.verifier)
    shutil.copytree(run.path, moved.path)
    as_if_killed_after(moved, 9)
    done = moved("train", *options, processes=processes[1])
    assert f"{processes[1]} process(es)" in done.stdout
    assert "going on from step 9" in done.stdout
    for ours, theirs in zip(metrics_of(moved), metrics_of(run), strict=True):
        assert_same_record(ours, theirs)
    ours, theirs = weights(moved), weights(run)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    assert not (checkpoints(moved) / ".universal").exists()
    as_if_killed_after(moved, 18)
    refused = moved("train", f"deepspeed.zero_stage={5 - zero_stage}", *options[1:], code=2)
    assert f"deepspeed.zero_stage must stay {zero_stage}" in refused.stderr


def poison(run: Run) -> str:
    """Make one stored state infinite and give the id of its sample."""
    path = sorted((run.path / "hidden_states").glob("shard-*"))[0]
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        states = header["aux_hidden_states"]
        file.seek(8 + length + states["data_offsets"][0] + 4 * 5 * states["shape"][1])
        file.write(struct.pack("<f", math.inf))
    return str(json.loads(header["__metadata__"]["fledge"])["sample_ids"][0])


@pytest.mark.parametrize(
    ("deepspeed", "dtype"),
    [
        ("zero0", "float32"),
        ("zero1", "float32"),
        ("zero2", "bfloat16"),
        ("zero2_offload", "bfloat16"),
        ("zero3", "float32"),
    ],
)
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_its_sample_named(finished, run, deepspeed, dtype):
    copy_parts(finished, run)
    name = poison(run)
    options = [
        f"deepspeed={deepspeed}",
        f"train.dtype={dtype}",
        "train.packs_per_step=2",
        "train.log_every=1",
    ]
    done = run("train", *options, "train.verify_checksums=false")
    skipped = [line for line in done.stderr.splitlines() if "is skipped" in line]
    assert skipped
    assert all(line.endswith(f"is skipped: the loss of {name} is not finite") for line in skipped)
    state = json.loads((checkpoints(run) / "step-24" / "trainer.json").read_text())
    assert state["skipped_steps"] == len(skipped)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    losses = {r["step"]: r["train/loss"] for r in metrics_of(run) if "train/loss" in r}
    assert losses[24] < 0.6 * min(losses[step] for step in (1, 2, 3))
    missing = set(range(1, 25)) - losses.keys()
    assert len(missing) == len(skipped), "a step without an update has no loss"


def test_training_that_diverged_stops_and_keeps_its_checkpoint(finished, run):
    copy_parts(finished, run)
    run("train")
    as_if_killed_after(run, 9)
    refused = run("train", "train.max_skipped_steps=2", "train.lr=1e30", "train.warmup_share=0", code=2)
    assert "made with other settings (train.lr" in refused.stderr
    fresh = Run(run.folder, run.verifier, name="diverged")
    copy_parts(finished, fresh)
    refused = fresh("train", "train.max_skipped_steps=2", "train.lr=1e30", "train.warmup_share=0", code=2)
    assert "2 steps in a row were skipped" in refused.stderr
    assert "train.init_from=<the newest checkpoint> may have a lower train.lr" in refused.stderr
    assert refused.stderr.count("is skipped:") == 2


def test_a_full_disk_costs_nothing_but_the_steps_since_the_last_checkpoint(finished, run):
    copy_parts(finished, run)
    run("train", "train.max_steps=24")
    as_if_killed_after(run, 9)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    command = run.command("train")[3:]
    code = f"{limit}import sys; from fledge.conf.cli import main; main(sys.argv[1:])"
    full = subprocess.run(
        [run.command("train")[0], "-c", code, *command], capture_output=True, text=True, check=False, env=os.environ
    )
    assert full.returncode == 2, full.stderr
    assert "the checkpoint of step 18 cannot be written" in full.stderr
    assert checkpoint_steps(checkpoints(run)) == [9]
    assert not (checkpoints(run) / ".saving").exists()
    run("train")
    ours, theirs = weights(run), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_checkpoint_stays_and_is_the_one_that_is_used(finished, run):
    copy_parts(finished, run)
    training = run.path / "training"
    run("train", "train.save_every=3")
    as_if_killed_after(run, 18)
    file = checkpoints(run) / "step-18" / "trainer.json"
    state = json.loads(file.read_text())
    saved = {r["step"]: r["heldout/acceptance_length_3"] for r in metrics_of(run) if "heldout/acceptance_length_3" in r}
    best = max((step for step in saved if step <= 18), key=lambda step: (saved[step], -step))
    assert (state["best_step"], state["best_acceptance_length"]) == (best, saved[best])
    file.write_text(json.dumps({**state, "best_acceptance_length": 3.9}))  # which no later step will reach
    run("train", "train.save_every=3", "train.keep_checkpoints=1")
    state = json.loads((checkpoints(run) / "step-24" / "trainer.json").read_text())
    assert (state["best_step"], state["best_acceptance_length"]) == (best, 3.9)
    assert checkpoint_steps(checkpoints(run)) == [best, 24]
    assert head_folder(None, training) == head_folder("best", training) == checkpoints(run) / f"step-{best}"
    assert head_folder("latest", training) == checkpoints(run) / "step-24"


def test_a_best_checkpoint_that_is_gone_is_named_no_more(finished, run):
    copy_parts(finished, run)
    run("train", "train.save_every=6")
    as_if_killed_after(run, 12)
    file = checkpoints(run) / "step-12" / "trainer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "best_step": 5, "best_acceptance_length": 3.9}))
    run("train", "train.save_every=6")
    state = json.loads((checkpoints(run) / "step-24" / "trainer.json").read_text())
    assert state["best_step"] in (18, 24)
    assert head_folder("best", run.path / "training").is_dir()


def test_another_measure_of_held_out_acceptance_makes_the_best_checkpoint_anew(finished, run):
    copy_parts(finished, run)
    run("train")
    as_if_killed_after(run, 18)
    best = json.loads((checkpoints(run) / "step-18" / "trainer.json").read_text())["best_acceptance_length"]
    run("train", "evaluate.num_draft_tokens=1")
    state = json.loads((checkpoints(run) / "step-24" / "trainer.json").read_text())
    assert state["best_step"] == 24
    assert state["best_acceptance_length"] < best, "fewer draft tokens are accepted of one than of three"


def test_a_signal_before_the_first_step_asks_for_another_start(finished, run):
    copy_parts(finished, run)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = popen(run.command("train"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    while not (run.path / "training" / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_several_processes_started_by_run_stop_together_with_their_own_exit_code(finished, run):
    copy_parts(finished, run)
    options = ["train.num_processes=2", "train.packs_per_step=2", "train.log_every=1"]
    assert "multiple of train.num_processes=2, got 3" in run("run", *options, "train.packs_per_step=3", code=2).stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = popen(run.command("run", *options), stdout=subprocess.PIPE, text=True, env=environment)
    while len(metrics_of(run)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGUSR1" in output
    assert checkpoint_steps(checkpoints(run))


def test_a_warm_start_is_of_a_form_that_every_option_of_draft_agrees_with(monkeypatch, tmp_path):
    head = make_head(num_layers=2, qk_norm=True, norm_before_fc=True, sliding_window=64, window_layers=(1,))
    save_head(tmp_path, head, {"verifier": {}}, torch.float32)
    monkeypatch.setattr(setup, "check_identity", lambda *_: None)
    form = {"vocab_size": 100, "num_layers": 2, "qk_norm": True, "norm_before_fc": True}

    def taken(**changes):
        config = Config(name="x", runs_dir=str(tmp_path / "runs"), draft=DraftConfig(**form | changes))
        return setup._initial_head(config, str(tmp_path))[0]

    window = {"sliding_window": 64, "window_layers": [1]}
    assert taken(**window, aux_layers=[1, 3, 4]).config == head.config
    with pytest.raises(ValueError, match=r"draft must describe the head at train.init_from: set draft.qk_norm=true$"):
        taken(**window, qk_norm=False)
    with pytest.raises(ValueError, match=r"set draft.sliding_window=64 draft.window_layers=\[1\]$"):
        taken(sliding_window=32, window_layers=[0])
    with pytest.raises(ValueError, match=r"set draft.sliding_window=64 draft.window_layers=\[1\]$"):
        taken()  # no window
    with pytest.raises(ValueError, match=r"set draft.window_layers=\[1\]$"):
        taken(sliding_window=64)  # in all layers
    save_head(tmp_path, make_head(), {"verifier": {}}, torch.float32)
    with pytest.raises(ValueError, match=r"set draft.sliding_window=null draft.window_layers=null$"):
        taken(**window, num_layers=1, qk_norm=False, norm_before_fc=False)


def test_a_warm_start_begins_where_the_other_head_ended(finished, run):
    copy_parts(finished, run)
    trained = checkpoints(finished) / "step-24"
    refused = run("train", f"train.init_from={trained}", "draft.fc_norm=false", "draft.num_layers=2", code=2)
    assert "set draft.num_layers=1 draft.fc_norm=true" in refused.stderr
    run("train", f"train.init_from={trained}", "train.lr=1e-30", "train.max_steps=1")
    head, _ = load_head(checkpoints(run) / "step-1")
    given, _ = load_head(trained)
    for name, tensor in given.state_dict().items():
        assert torch.allclose(head.state_dict()[name], tensor, atol=1e-12), name
