"""The job files: clean to the shell, every word as it was given, in the cluster's sizes; and what waits for what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import fledge
from fledge.conf.runtime.launch import environments
from fledge.conf.runtime.rank_info import RankInfo
from fledge.conf.schema import (
    Config,
    ContainerConfig,
    ContainerKind,
    ServerConfig,
    ServerKind,
    SourceConfig,
    StoreConfig,
)
from fledge.slurm.jobs.render import TEMPLATES, _server_sizes, expand, for_slurm, render_jobs

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ("cluster.container.image='/im ages/it.sqsh'", "cluster.container.mounts=['/da ta:/da ta']")
VARIANTS = {
    "here": ("cluster=one_machine",),
    "gpus": ("cluster=slurm_gpu", "cluster.gpu_type=h100", "cluster.gpu_request=gres", "cluster.modules=[cuda/12]"),
    "venv": (
        "cluster=slurm_gpu",
        "cluster.venv='$HOME/my env'",
        "cluster.scratch='$TMP'",
        "cluster.setup=[ulimit -n 9]",
    ),
    "pyxis": ("cluster=slurm_gpu", "cluster.container.kind=pyxis", *CONTAINER),
    "apptainer": ("cluster=slurm_gpu", "cluster.container.kind=apptainer", *CONTAINER),
    "sglang": ("cluster=slurm_gpu", "cluster.server.kind=sglang", "cluster.server.tasks=3"),
    "trtllm": ("cluster=slurm_gpu", "cluster.server.kind=trtllm", "cluster.account=a", "cluster.qos=high"),
    "custom": (
        "cluster=one_machine",
        "cluster.server.kind=custom",
        "cluster.server.command=[my server,'{model}','{port}']",
    ),
}
PLACES = ("name='it\\'s a \"run\" $HOME `id`'", "runs_dir='/pla ce/50%/\"q\"'", "verifier.path='/a model'")


def printed(*options: str) -> dict[str, str]:
    """Give the job files that --dry-run prints, by stage."""
    done = fledge("submit", "experiment=demo", "train.packs_per_step=2", *PLACES, *options, "--dry-run", PATH="/none")
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^##### (.*)$\n", done.stdout, flags=re.MULTILINE)
    return {Path(name).stem: text for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_job_files_are_clean_to_shellcheck_and_say_nothing_of_this_machine(variant, tmp_path):
    jobs = printed(*VARIANTS[variant])
    served = variant != "here"
    assert list(jobs) == [*(["server"] if served else []), "synthesize", "dump", "train", "evaluate", "export"]
    for stage, text in jobs.items():
        (tmp_path / f"{stage}.sbatch").write_text(text)
        for word in (str(ROOT), str(Path.home()), sys.prefix, os.uname().nodename):
            if len(word) > 3:
                assert word not in text
    files = [*tmp_path.glob("*.sbatch"), TEMPLATES / "common.sh"]
    check = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([check, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_paths_and_values_reach_the_shell_as_they_are(tmp_path):
    """What a job would run: its srun replaced by what prints its arguments, a line each."""
    text = printed(*VARIANTS["custom"], "cluster.env.WORDS='a  b \"c\" `id` $(id) $ONE'")["server"]
    (tmp_path / "common.sh").write_text(
        'begin() { :; }\nfree_port() { echo 1; }\nserve() { printf "%s\\n" "$@" "$WORDS"; }\n'
    )
    text = re.sub(r"^jobs=.*$", f"jobs='{tmp_path}'", text, flags=re.MULTILINE)
    environment = {**os.environ, "ONE": "1", "SLURM_ARRAY_TASK_ID": "0"}
    run = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.endswith('my server\n/a model\n1\na  b "c" `id` $(id) 1\n')
    assert """sbatch "/pla ce/50%/\\"q\\"/it's a \\"run\\" \\$HOME \\`id\\`/jobs/1/server.sbatch"\n""" in text
    assert '--output="/pla ce/50%%/\\"q\\"/it\'s a \\"run\\" $HOME `id`/jobs/1/logs/server-%A_%a.log"' in text


def test_words_are_quoted_for_slurm_and_for_the_shell():
    assert for_slurm("64G") == "64G"
    assert for_slurm('a "b" \\') == '"a \\"b\\" \\\\"'
    assert expand("plain/path-1") == "plain/path-1"
    assert expand('$HOME/a "b" $(id) `id` $5') == '"$HOME/a \\"b\\" \\$(id) \\`id\\` \\$5"'


def test_arrays_parts_and_processes_are_those_of_the_cluster():
    options = (
        "cluster.synthesize.tasks=5",
        "cluster.synthesize.at_once=2",
        "cluster.dump.tasks=3",
        "train.num_processes=2",
    )
    jobs = printed("cluster=one_machine", *options, "train.packs_per_step=4")
    assert "#SBATCH --array=0-4%2\n" in jobs["synthesize"]
    assert 'synthesize.shard="$SLURM_ARRAY_TASK_ID" synthesize.num_shards=5' in jobs["synthesize"]
    assert 'dump.writer="$SLURM_ARRAY_TASK_ID" dump.num_writers=3' in jobs["dump"]
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in jobs["train"]
    assert "-m fledge.slurm.jobs.node 2 train " in jobs["train"]
    assert "#SBATCH --array=0-0\n" in printed("cluster=one_machine", "train.hidden_states=online")["dump"]
    four = ["cluster=one_machine", "cluster.dump.gpus=4", "submit.stages=[synthesize,dump,train,export]"]
    for option in ("verifier.tensor_parallel=true", "cluster.dump.processes=4"):
        assert "-m fledge.slurm.jobs.node 4 dump " in printed(*four, option)["dump"]


def test_servers_are_started_in_their_engines_words():
    served = {kind: printed(*VARIANTS[kind])["server"] for kind in ("gpus", "sglang", "trtllm")}
    where = "'/a model' --host 0.0.0.0 --port \"$port\""
    assert f"vllm serve {where} --tensor-parallel-size 8 --max-model-len 8192\n" in served["gpus"]
    sglang = f"python -m sglang.launch_server --model-path {where}"
    assert f"{sglang} --tp-size 8 --context-length 8192\n" in served["sglang"]
    assert f"trtllm-serve {where} --tp_size 8 --max_seq_len 8192\n" in served["trtllm"]
    assert "#SBATCH --array=0-2\n" in served["sglang"]


@pytest.mark.parametrize(
    ("kind", "gpus", "shared", "length", "words"),
    [
        ("vllm", 8, 2, None, "--tensor-parallel-size 2 --data-parallel-size 4"),
        ("vllm", 8, 1, 4096, "--tensor-parallel-size 1 --data-parallel-size 8 --max-model-len 4096"),
        ("vllm", 0, None, None, ""),
        ("sglang", 8, 4, 4096, "--tp-size 4 --dp-size 2 --context-length 4096"),
        ("trtllm", 4, 4, None, "--tp_size 4"),
    ],
)
def test_copies_and_lengths_of_a_server(kind, gpus, shared, length, words):
    server = ServerConfig(kind=ServerKind(kind), gpus=gpus, tensor_parallel=shared, max_length=length)
    assert " ".join(_server_sizes(server)) == words


@pytest.mark.parametrize("kind", list(ContainerKind))
def test_a_container_has_every_absolute_path_that_options_name_once(kind):
    config = Config(name="x", runs_dir="runs")
    config.verifier.path, config.synthesize.model, config.dump.folder = "/mo dels/$a", "org/name", "/scratch/states"
    config.train.stores = [StoreConfig(folder=folder) for folder in ("/scratch/states", "/other", "/other/deeper", "b")]
    config.data.sources = [SourceConfig(path="/data/prompts.jsonl"), SourceConfig(path="/hub/brought/in")]
    config.cluster.container = ContainerConfig(kind=kind, image="i", mounts=["$HUB:/hub"])
    job = next(job.text for job in render_jobs(config, Path("runs/x/jobs/1")) if job.stage == "dump")
    paths = ["/mo dels/\\$a", "/scratch/states", "/other", "/data/prompts.jsonl"]
    if kind is ContainerKind.pyxis:
        named = ",".join(f"{path}:{path}" for path in paths)
        assert (
            f'--container-mounts="$PWD:$PWD,$jobs:$jobs,${{jobs%/jobs/*}}:${{jobs%/jobs/*}},{named},$HUB:/hub"' in job
        )
    elif kind is ContainerKind.apptainer:
        binds = " ".join(f'--bind "{path}"' for path in ["$PWD", "${jobs%/jobs/*}", *paths, "$HUB:/hub"])
        assert f"apptainer exec {binds} --pwd" in job
    else:
        assert "/mo dels" not in job


def test_an_export_waits_for_training_and_no_evaluation(tmp_path):
    """Slurm's command replaced by one that numbers the jobs and writes down what they wait for."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    sbatch = folder / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$2" >>{tmp_path}/told\nwc -l <{tmp_path}/told\n')
    sbatch.chmod(0o755)
    given = ("experiment=demo", "name=x", f"runs_dir={tmp_path}", "cluster=one_machine", "train.packs_per_step=2")
    container = ("cluster.container.kind=pyxis", "cluster.container.image=i", f"dump.folder={tmp_path}/states")
    done = fledge("submit", *given, *container, PATH=f"{folder}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "states").is_dir(), "a container mounts what is there"
    first, *others = (tmp_path / "told").read_text().splitlines()
    assert first.endswith("synthesize.sbatch")
    assert others == [f"--dependency=afterok:{job}" for job in (1, 2, 3, 3)]
    assert "after train has ended well" in printed("cluster=one_machine")["export"]
    assert (
        " after " not in printed("cluster=one_machine", "submit.stages=[evaluate,export]")["export"].split("sbatch")[0]
    )


def test_a_node_is_a_part_of_the_ranks_of_all():
    second = RankInfo(rank=1, world=3, address="n1", port=4711)
    told = [environment or {} for environment in environments(2, second)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"]) for e in told] == [
        ("2", "0", "6", "2"),
        ("3", "1", "6", "2"),
    ]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in told} == {("n1", "4711")}
    assert environments(1) == [None]
