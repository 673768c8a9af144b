"""Job files and what is told of them, without Slurm: quoting, chains, errors; runs of which only artifacts are left."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import composed, copy_until_dump
from commands import popen, run_command
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
from fledge.slurm.jobs.queue import _parse, array_tasks, submit_file
from fledge.slurm.jobs.records import JobRecord, freeze, write_submission
from fledge.slurm.jobs.render import TEMPLATES, _server_sizes, expand, for_slurm, render_jobs
from fledge.slurm.status import CANCELLED, DONE, FAILED, WAITING, TaskStatus, _name_causes, status, task_statuses
from fledge.slurm.submit import check_cluster
from omegaconf import OmegaConf

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


def fledge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fledge", *arguments]
    return run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


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
    together = printed("cluster=one_machine", "cluster.dump.gpus=4", "verifier.tensor_parallel=true")["dump"]
    assert "-m fledge.slurm.jobs.node 4 dump " in together


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


def refused(change: Callable[[Config], None]) -> str:
    """Give the sentence by which a changed configuration is refused."""
    config = Config(name="x")
    config.verifier.path, config.cluster.server.gpus = "/a model", 8
    config.cluster.server.kind = ServerKind.vllm
    check_cluster(config)
    change(config)
    with pytest.raises(ValueError, match="must") as error:
        check_cluster(config)
    return str(error.value)


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


def test_a_path_that_no_container_can_mount_is_refused():
    def given(config: Config) -> None:
        config.cluster.container = ContainerConfig(kind=ContainerKind.pyxis, image="i")
        config.dump.folder = "/scratch/a,b"

    assert "must be without colons and commas, got /scratch/a,b" in refused(given)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_APIKEY", "TOKEN", "DB_PASSWORD", "CLIENT_SECRET"],
)
def test_variables_that_may_be_keys_are_refused_and_others_with_such_words_are_not(name):
    def given(config: Config) -> None:
        config.cluster.env = {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "9", "KEYBOARD": "us", name: "x"}

    assert f"cluster.env.{name} must not be given" in refused(given)


def test_a_job_that_is_told_to_stop_from_its_start_is_refused():
    def brief(config: Config) -> None:
        config.cluster.export.hours, config.cluster.warn_s = 0.1, 600

    assert "cluster.export.hours must be more than cluster.warn_s=600 seconds" in refused(brief)
    for cluster in ("one_machine", "slurm_gpu"):
        given = ("train.packs_per_step=2", "verifier.path=x")
        check_cluster(composed("experiment=demo", "name=x", f"cluster={cluster}", *given))


def test_sizes_that_no_server_could_have_are_refused():
    def three(config: Config) -> None:
        config.cluster.server.tensor_parallel = 3

    def copies(config: Config) -> None:
        config.cluster.server.tensor_parallel, config.cluster.server.kind = 4, ServerKind.trtllm

    def short(config: Config) -> None:
        config.cluster.server.max_length = config.synthesize.max_tokens

    assert "cluster.server.tensor_parallel must divide cluster.server.gpus=8" in refused(three)
    assert "start more servers (cluster.server.tasks) with fewer GPUs" in refused(copies)
    assert "cluster.server.max_length must be above synthesize.max_tokens=1024" in refused(short)


def test_every_submission_that_is_written_down_is_one(tmp_path):
    pages = [ROOT / "README.md", ROOT / "conf" / "cli.py", *(ROOT / "docs").rglob("*.md")]
    joined = "\n".join(page.read_text().replace("\\\n", " ") for page in pages)
    commands = re.findall(
        r"^ *fledge submit (experiment=.*?)(?:  +#.*|  +the job files, printed)?$", joined, re.MULTILINE
    )
    assert len(commands) >= 4
    for words in {" ".join(command.split()).removesuffix(" --dry-run") for command in commands}:
        check_cluster(composed(*shlex.split(words)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["cluster=slurmgpu"], ["slurmgpu", "one_machine", "slurm_gpu"]),
        (["cluster=one_machine"], ["sbatch is not there", "login node", "--dry-run"]),
        (["cluster=one_machine", "train.packs_per_step=1"], ["train.packs_per_step", "multiple of the 2 processes"]),
        (["cluster=one_machine", "submit.stages=[trian]"], ["submit.stages", "trian", "train"]),
        (["cluster=one_machine", "cluster.dump.nodes=2"], ["cluster.dump.nodes must be 1"]),
        (["cluster=one_machine", "cluster.server.kind=custom"], ["cluster.server.command must be given"]),
        (["cluster=one_machine", "cluster.server.kind=vllm"], ["verifier.path", "embedded"]),
        (["cluster=one_machine", "cluster.env.HF_TOKEN=hf_secret"], ["cluster.env.HF_TOKEN", "hold no keys"]),
        (
            ["cluster=slurm_gpu", "verifier.path=x", "cluster.server.options=[--api-key,secret]"],
            ["--api-key", "VLLM_API_KEY"],
        ),
        (
            ["cluster=one_machine", "evaluate.engine=server"],
            ["evaluate.endpoint is required", "submit.stages=[synthesize,dump,train,export]", "fledge evaluate"],
        ),
        (["cluster=one_machine", "dump.num_writers=2"], ["cluster.dump.tasks"]),
        (["cluster=one_machine", "cluster.container.kind=pyxis"], ["cluster.container.image is required"]),
    ],
)
def test_what_no_job_could_do_is_refused_in_one_sentence(tmp_path, options, words):
    given = ("experiment=demo", "name=x", f"runs_dir={tmp_path}", "train.packs_per_step=2", *options)
    done = fledge("submit", *given, PATH="/none")
    assert done.returncode == 2, done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.strip())
    assert all(word in line for word in words), line
    assert "secret" not in line
    assert not list(tmp_path.iterdir())


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


def as_commands(folder: Path, monkeypatch, **scripts: str) -> None:
    """Put commands on PATH, each a line of bash."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


BANNER = r"printf 'Welcome, 12 users\n--> Checking 3 queues (login4)...OK\n\n'; "


@pytest.mark.parametrize(
    "said",
    [
        "echo 4711",
        "echo '4711;alps'",
        BANNER + "echo 4711",
        BANNER + "echo '4711;alps'; echo; echo Good luck",
        r"printf '4711 \r\n'",
        "echo 'Submitted batch job 4711'",
        "echo 'Submitted batch job 4711 on cluster alps'; echo 'sbatch: 5 jobs' >&2",
    ],
)
def test_the_id_of_a_job_is_found_among_whatever_sbatch_says(tmp_path, monkeypatch, said):
    as_commands(tmp_path / "bin", monkeypatch, sbatch=said)
    assert submit_file(tmp_path / "a.sbatch", None) == "4711"


@pytest.mark.parametrize("said", ["true", "echo Welcome", "echo 'job 12 of user 7'; echo submitted >&2"])
def test_an_sbatch_that_names_no_job_is_quoted(tmp_path, monkeypatch, said):
    as_commands(tmp_path / "bin", monkeypatch, sbatch=said)
    with pytest.raises(
        ValueError, match=r"sbatch names no job for .*a\.sbatch, it says '.*': see with squeue"
    ) as caught:
        submit_file(tmp_path / "a.sbatch", None)
    assert said == "true" or said.split()[1].strip("';") in str(caught.value)


def test_jobs_see_the_states_of_jobs_among_whatever_squeue_says(tmp_path, monkeypatch):
    def told(function: str) -> bool:
        command = f"SLURM_JOB_ID=7; . {TEMPLATES / 'common.sh'}; {function}"
        return subprocess.run(["bash", "-c", command], check=False).returncode == 0

    for state, running, cancelled in (("RUNNING None", 1, 0), ("CANCELLED None", 0, 1), ("", 0, 0)):
        shown = f"[[ $* == *'%T %r'* ]] && echo '{state}' || echo '{state.partition(' ')[0]}'"
        for before in ("", BANNER, "echo 'squeue: warning' >&2; "):
            as_commands(tmp_path / "bin", monkeypatch, squeue=before + shown)
            assert (told("is_running 7"), told("is_cancelled")) == (running, cancelled), (state, before)


def test_jobs_are_read_as_slurm_shows_them():
    line = (
        "JobId=8 ArrayJobId=3 ArrayTaskId=0 JobName=x JobState=FAILED Reason=NonZeroExitCode Requeue=1 "
        "Restarts=2 BatchFlag=1 Reboot=0 ExitCode=2:0 NodeList=n0 ReqNodeList=(null)"
    )
    state = _parse(line)
    assert (state.tasks, state.state, state.reason) == ({0}, "FAILED", "NonZeroExitCode")
    assert (state.exit_code, state.nodes, state.live) == ("2:0", "n0", False)
    assert _parse(line.replace("ArrayTaskId=0 ", "ArrayTaskId=2-3,7%4 ")).tasks == {2, 3, 7}
    for named in ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING", "REQUEUE_FED", "RESV_DEL_HOLD"):
        assert _parse(line.replace("FAILED", named)).live, "it may still run"


def test_tasks_of_an_array_are_read_as_slurm_writes_them():
    written = {"5": {5}, "0,2-5%4": {0, 2, 3, 4, 5}, "0-10:5": {0, 5, 10}, "1-3,8-9": {1, 2, 3, 8, 9}, "0": {0}}
    assert {text: array_tasks(text) for text in written} == written
    assert array_tasks("") is None
    assert array_tasks("1-3,5,...") is None


def test_what_waits_says_nothing_of_tasks_that_slurm_has_forgotten(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    ended = {"0": "done\t", "2": "again\tstopped by SIGUSR1"}
    for task, told in ended.items():
        (tmp_path / "events" / f"dump-{task}").write_text(f"t0\t8\tbegun\tn0, start 1\nt1\t8\t{told}\n")
    record = JobRecord("dump", "dump.sbatch", "3", 6)

    def told(*lines: str) -> list[tuple[str, str]]:
        monkeypatch.setattr("fledge.slurm.status.job_states", lambda _: [_parse(line) for line in lines])
        return [(task.state, task.detail) for task in task_statuses(tmp_path, record)]

    waiting = "JobId=3 ArrayJobId=3 ArrayTaskId=4-5%4 JobState=PENDING Reason=JobArrayTaskLimit"
    left = (CANCELLED, "left the queue without having begun")
    again = (CANCELLED, "left the queue without having begun again")
    later = (WAITING, "JobArrayTaskLimit")
    assert told(waiting) == [(DONE, ""), left, again, left, later, later]
    assert told() == [(DONE, ""), left, again, left, left, left]
    held = "JobId=4 ArrayJobId=3 ArrayTaskId=2 JobState=REQUEUE_HOLD Reason=job_requeued_in_held_state"
    assert told(held)[2][0] == WAITING
    assert told(held)[2][1].startswith("requeue_hold, job_requeued_in_held_state, last: stopped by SIGUSR1")


def make_submission(run_folder: Path, events: dict[str, str]) -> Path:
    folder = run_folder / "jobs" / "1"
    (folder / "events").mkdir(parents=True)
    (folder / "logs").mkdir()
    jobs = [JobRecord("dump", "dump.sbatch", "3", 2)]
    jobs += [JobRecord(stage, f"{stage}.sbatch", str(id_), None) for id_, stage in enumerate(("train", "evaluate"), 4)]
    write_submission(folder, {"submitted": "today", "git": {"commit": "a" * 40, "dirty": True}}, jobs)
    for name, text in events.items():
        (folder / "events" / name).write_text(text)
    return folder


def test_a_failed_evaluation_is_no_cause_for_an_export(tmp_path):
    stages = (("dump", DONE), ("train", DONE), ("evaluate", FAILED), ("export", WAITING))
    tasks = {stage: [TaskStatus(stage, "1", state, "", tmp_path)] for stage, state in stages}
    _name_causes(tasks)
    assert tasks["export"][0].state == WAITING
    tasks["train"][0].state = FAILED
    _name_causes(tasks)
    assert (tasks["export"][0].state, tasks["export"][0].detail) == (CANCELLED, "train failed")


def test_status_tells_what_failed_and_why_from_events_alone(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    run_folder = tmp_path / "it's a run"
    for name in ("prompts", "conversations", "hidden_states"):
        shutil.copytree(finished.path / name, run_folder / name)
    began, done = "t0\t8\tbegun\tn0, start 1\n", "t1\t8\tdone\t\n"
    failed = "t1\t4\tagain\tstopped by SIGUSR1\nt2\t4\tbegun\tn0, start 2\nt3\t4\tfailed\texit code 2\n"
    folder = make_submission(run_folder, {"dump-0": began + done, "dump-1": began, "train": began + failed})
    (folder / "logs" / "train-4.log").write_text("many\nlines\nfledge: error: the disk is full\n")
    config = Config()
    config.status.run, config.status.lines = str(run_folder), 2
    status(config)
    out = capsys.readouterr().out
    for text in (
        "commit aaaaaaaaaa with changes",
        "synthesize done       64 of 64 conversations",
        "1 done, 1 running",
        "dump-1: job 3_1 running: since t0",
        "train: job 4 failed: exit code 2, start 2",
        "evaluate: job 5 cancelled: train failed",
        "export     not submitted",
        "  | lines\n  | fledge: error: the disk is full\n",
    ):
        assert text in out, out
    assert "many" not in out


def test_status_of_a_run_that_was_not_submitted_is_that_of_its_artifacts(finished):
    by_name = fledge("status", finished.name, f"runs_dir={finished.folder}")
    assert by_name.returncode == 0, by_name.stderr
    assert "never submitted" in by_name.stdout
    assert re.search(r"train +done +step 24 of 24, loss \d", by_name.stdout)
    assert re.search(r"evaluate +done +acceptance length \d\.\d\d\n", by_name.stdout)
    assert fledge("status", str(finished.path)).stdout == by_name.stdout
    missing = fledge("status", "nowhere")
    assert missing.returncode == 2
    assert "runs/nowhere is not there" in missing.stderr


@pytest.mark.parametrize("stage", ["dump", "evaluate"])
def test_a_signal_stops_a_stage_with_everything_saved(stage, finished, run):
    grows = {"dump": "hidden_states/shard-*.safetensors", "evaluate": "evaluation/questions.jsonl"}[stage]
    copy_until_dump(finished, run)
    if stage == "dump":
        shutil.rmtree(run.path / "hidden_states")
    else:
        shutil.copytree(finished.path / "training", run.path / "training")
    options = {"dump": ["dump.shard_tokens=60", "dump.batch_tokens=64"], "evaluate": ["evaluate.max_tokens=64"]}[stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with popen(run.command(stage, *options), stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not any(path.stat().st_size for path in run.path.glob(grows)):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate()
    assert process.returncode == 75, error
    assert f"{stage}: stopped by SIGUSR1" in error
    assert "Traceback" not in error
    before = {path: path.read_bytes() for path in run.path.glob(grows)}
    run(stage, *options)
    assert all(path.read_bytes().startswith(content) for path, content in before.items()), "nothing is made twice"


def test_a_frozen_run_is_its_configuration_and_its_code(tmp_path):
    folder = tmp_path / "it's frozen"
    folder.mkdir()
    config = Config(name="it's a run")
    config.verifier.path, config.train.lr, config.verifier.chat_template_kwargs = (
        "/a model",
        0.5,
        {"date": "1 May: now"},
    )
    config.data.sources = [SourceConfig(path="x", weight=2.0)]
    about = freeze(config, folder, ["train.lr=0.5"])
    assert about["overrides"] == ["train.lr=0.5"]
    assert re.fullmatch(r"[0-9a-f]{40}", about["git"]["commit"])
    code = {"PYTHONPATH": str(folder / "code")}
    shown = fledge("train", "--config-dir", str(folder), "--config-name", "frozen", "--cfg", "job", **code)
    assert shown.returncode == 0, shown.stderr
    assert OmegaConf.create(shown.stdout) == OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    found = subprocess.run(
        [sys.executable, "-c", "import fledge; print(fledge.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **code},
    )
    assert found.stdout.startswith(str(folder))
    copied = folder / "code" / "fledge"
    assert not (copied / "tests").exists()
    assert (copied / "slurm" / "jobs" / "templates" / "common.sh").is_file()
    assert (copied / "conf" / "experiment" / "demo.yaml").is_file()
