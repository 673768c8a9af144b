"""`-m`: jobs are processes and runs of their own, and a sweeper learns their acceptance length."""

import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from commands import run_command
from fledge.conf.cli import main
from fledge.conf.cli.sweep import Sweep
from fledge.models.formats.training_folder import STATE, head_folder
from fledge.train.metrics.tracking import read_metrics
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "sweeps.md"
FEW_STEPS = ("train.max_steps=2", "train.save_every=2", "train.heldout_every=2", "train.log_every=2")


def read_yaml(path):
    return yaml.safe_load(path.read_text())


def test_each_job_trains_a_run_of_its_own_on_the_store_of_the_run_that_is_named(finished, run, tmp_path):
    folder = f"dump.folder={finished.path / 'hidden_states'}"
    command = run.command("train", folder, "-m", *FEW_STEPS, "train.lr=1e-2,1e-4")
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = [run.folder / "run-train.lr-0.01", run.folder / "run-train.lr-0.0001"]
    assert [read_yaml(job / "training" / "config.yaml")["train"]["lr"] for job in jobs] == [1e-2, 1e-4]
    lengths = []
    for job in jobs:
        measured = [record.get("heldout/acceptance_length_3") for record in read_metrics(job / "training")]
        lengths.append(max(filter(None, measured)))
        assert re.search(rf"^\| {job.name} +\| +step-\d+ +\| +\d+ +\| +{lengths[-1]:.3f} ", done.stdout, re.MULTILINE)
    assert lengths[0] != lengths[1]
    assert sorted(os.listdir(run.folder)) == ["run", "run-train.lr-0.0001", "run-train.lr-0.01"]
    assert os.listdir(run.path) == ["sweep"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "no multirun/ where it was started"
    again = run_command([*command[:-1], "train.lr=1e-2"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_jobs_find_the_store_of_the_run_that_is_named_by_themselves(finished, run):
    run.path.mkdir(parents=True)
    (run.path / "hidden_states").symlink_to(finished.path / "hidden_states")
    run("train", "-m", *FEW_STEPS, "train.seed=1,2")
    assert all(
        (run.folder / f"run-train.seed-{seed}" / "training" / "checkpoints" / "best").exists() for seed in (1, 2)
    )


def test_a_job_that_fails_does_not_stop_the_others_and_its_exit_code_is_the_sweeps(finished, run):
    folders = f"dump.folder={run.folder / 'none'},{finished.path / 'hidden_states'}"
    done = run("train", "-m", *FEW_STEPS, folders, code=2)
    assert "run `fledge dump` first" in done.stderr
    assert "ended with exit code 2; the same command goes on there" in done.stderr
    assert "Held-out answers, greedy" in done.stdout, "the other was trained"


def test_jobs_that_would_share_a_run_are_refused(run):
    done = run("evaluate", "-m", "evaluate.temperature=0,1", code=2)
    assert "-m with evaluate needs names to sweep over" in done.stderr


def test_a_launcher_of_ranks_is_refused(run, monkeypatch, capfd):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(SystemExit):
        main(["train", *run.arguments("-m", "train.lr=1,2")])
    assert "set train.num_processes, without torchrun or srun" in capfd.readouterr().err


def test_optuna_maximises_unless_it_is_told():
    assert Sweep("train", ["a=1", "-m", "hydra/sweeper=optuna"]).arguments() == [
        *("-m", "a=1", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize")
    ]
    told = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=minimize"]
    assert Sweep("train", told).arguments() == told


@pytest.mark.skipif(
    find_spec("hydra_plugins") is None or find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed",
)
def test_optuna_keeps_the_run_of_the_longest_acceptance_length(finished, run):
    folder, trials = f"dump.folder={finished.path / 'hidden_states'}", "hydra.sweeper.n_trials=3"
    few = ("train.max_steps=6", *FEW_STEPS[1:])
    run("train", "-m", "hydra/sweeper=optuna", trials, folder, *few, "train.lr=tag(log,interval(1e-5,1e-1))")
    best = read_yaml(run.path / "sweep" / "optimization_results.yaml")
    lengths = {}
    for job in run.folder.glob("run-*"):
        state = read_yaml(head_folder(None, job / "training") / STATE)
        lengths[read_yaml(job / "training" / "config.yaml")["train"]["lr"]] = state["best_acceptance_length"]
    assert len(lengths) == 3
    assert best["best_value"] == max(lengths.values())
    assert lengths[best["best_params"]["train.lr"]] == max(lengths.values())


def test_the_sweep_of_wandb_that_is_written_down_starts_a_run_a_trial(monkeypatch, capfd):
    """What `wandb agent` would start, made by its own functions, composes."""
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1])
    assert config["metric"]["goal"] == "maximize"
    chosen = {"train.lr": {"value": 0.0003}, "train.gamma": {"value": 0.9}}
    assert config["parameters"].keys() == chosen.keys()
    macros = create_sweep_command_args({"args": chosen})
    command = create_sweep_command(config["command"])
    words = [word for part in command for word in (macros[part[2:-1]] if part == "${args_no_hyphens}" else [part])]
    assert words[0] == "fledge"
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3")  # as the agent sets it
    main([*shlex.split(shlex.join(words))[1:], "--cfg", "job", "--resolve"])
    composed = OmegaConf.create(capfd.readouterr().out)
    assert (composed.name, composed.train.lr, composed.train.gamma) == ("trial-a1b2c3", 0.0003, 0.9)
