"""`fledge submit`: a run as Slurm jobs, each of which begins when what it needs has ended well.

Everything of a submission is in runs/NAME/jobs/N/: job files, `frozen.yaml`, `code/`, `logs/`, what the jobs tell
(`events/`, `servers/`, `restarts/`), and `submission.json`, which names the jobs.
"""

from __future__ import annotations

import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from ..conf.runtime.artifact import write_atomic
from ..conf.runtime.launch import STAGES
from ..conf.schema import ClusterConfig, Config, ContainerKind, JobConfig, ServerKind
from .jobs.freeze import freeze
from .jobs.queue import cancel, has_slurm, job_states, submit_file
from .jobs.records import JOBS, LOGS, JobRecord, read_submission, submissions, write_submission
from .jobs.render import (
    COMMON,
    SERVER,
    TEMPLATES,
    Job,
    mounted_paths,
    render_jobs,
    served_model,
    server_copies,
    stage_before,
)
from .plan.verifier_shape import planned_head

_SECRET = re.compile(r"(^|_)((API|ACCESS)?KEY|TOKEN|SECRET|PASS\w*)$", re.IGNORECASE)


def submit(config: Config) -> None:
    """Submit the stages of a run; with `submit.dry_run` print their job files."""
    check_cluster(config)
    _check_head(config)
    number = max(submissions(config.run_folder), default=0) + 1
    folder = config.run_folder / JOBS / str(number)
    jobs = render_jobs(config, folder)
    if config.submit.dry_run:
        for job in jobs:
            print(f"##### {folder / job.file}\n{job.text}")
        return
    if not has_slurm():
        raise ValueError(
            "fledge submit needs Slurm's commands, and sbatch is not there: start it on a login node of the cluster, "
            "or give --dry-run to see the job files"
        )
    _refuse_if_queued(config.run_folder)
    folder.mkdir(parents=True)
    if config.dump.folder and config.cluster.container.kind is not ContainerKind.none:
        config.hidden_states_folder.mkdir(parents=True, exist_ok=True)  # containers mount what is there
    (folder / LOGS).mkdir()  # or Slurm, which does not make it, lets the job fail
    about = freeze(config, folder, list(HydraConfig.get().overrides.task))
    shutil.copy2(TEMPLATES / COMMON, folder)
    for job in jobs:
        write_atomic(folder / job.file, job.text)
    ids = _chain(jobs, folder)
    records = [JobRecord(job.stage, job.file, ids[job.stage], job.tasks) for job in jobs]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_submission(folder, {"name": config.name, "submitted": now, **about}, records)
    if SERVER in ids:
        write_atomic(folder / "synthesize.job", ids["synthesize"] + "\n")
    for job in jobs:
        print(f"{job.stage:<10} job {ids[job.stage]}{f', {job.tasks} tasks' if (job.tasks or 1) > 1 else ''}")
    print(f"submitted from {folder}; `fledge status {config.run_folder}` tells where they stand")


def _check_head(config: Config) -> None:
    try:
        planned_head(config)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError) or Path(config.verifier.path).exists():
            raise
        print(f"submit: the first job checks the verifier, which is not at hand here: {error}", file=sys.stderr)


def _chain(jobs: list[Job], folder: Path) -> dict[str, str]:
    """Submit job files one after the other; where one is refused, none stays."""
    ids: dict[str, str] = {}
    by_stage = {job.stage: job for job in jobs}
    try:
        for job in jobs:
            before = stage_before(job.stage, list(by_stage))
            ids[job.stage] = submit_file(folder / job.file, _dependency(by_stage[before], ids) if before else None)
    except BaseException:
        cancel(list(ids.values()))
        shutil.rmtree(folder)
        raise
    return ids


def _dependency(before: Job, ids: dict[str, str]) -> str:
    """Give what a job waits for: any server that has begun, or the end of the stage before."""
    if before.stage == SERVER:
        return "?".join(f"after:{ids[SERVER]}_{task}" for task in range(before.tasks or 1))
    return f"afterok:{ids[before.stage]}"


def _refuse_if_queued(run_folder: Path) -> None:
    for folder in submissions(run_folder).values():
        for record in read_submission(folder)[1]:
            states = job_states(record.id)
            if states is None:
                raise ValueError("Slurm does not answer (scontrol show job): try again when it does")
            if live := [state for state in states if state.live]:
                raise ValueError(
                    f"job {record.id} ({record.stage}) of {folder} is {live[0].state.lower()}: wait for it, or "
                    f"cancel it with scancel, before {run_folder} is submitted again"
                )


def check_cluster(config: Config) -> None:
    """Refuse what no job could do.

    Raises:
        ValueError: names the option.
    """
    cluster = config.cluster
    unknown = [stage for stage in config.submit.stages if stage not in STAGES]
    if unknown or not config.submit.stages:
        raise ValueError(f"submit.stages must name some of {', '.join(STAGES)}, got {config.submit.stages}")
    if "evaluate" in config.submit.stages and config.evaluate.lacks_server:
        raise ValueError(
            "evaluate.endpoint is required with evaluate.engine=server and evaluate among submit.stages: set "
            "submit.stages=[synthesize,dump,train,export], serve the verifier with the export, then "
            "`fledge evaluate ... evaluate.endpoint=http://HOST:8000/v1`"
        )
    for stage in (SERVER, *STAGES):
        _check_job(stage, getattr(cluster, stage), cluster.warn_s)
    if cluster.warn_s < 1 or cluster.max_restarts < 1:
        raise ValueError("cluster.warn_s and cluster.max_restarts must be at least 1")
    if cluster.gpu_request not in ("gpus-per-node", "gres"):
        raise ValueError(f"cluster.gpu_request must be gpus-per-node or gres, got {cluster.gpu_request}")
    if cluster.container.kind is not ContainerKind.none and not cluster.container.image:
        raise ValueError(
            f"cluster.container.image is required with cluster.container.kind={cluster.container.kind.value}"
        )
    mounted = mounted_paths(config) if cluster.container.kind is not ContainerKind.none else []
    if unfit := [path for path in mounted if re.search("[:,]", path)]:
        raise ValueError(f"paths that containers mount must be without colons and commas, got {unfit[0]}")
    ranks = config.train.num_processes * cluster.train.nodes
    if config.train.packs_per_step % ranks:
        raise ValueError(
            f"train.packs_per_step must be a multiple of the {ranks} processes of cluster.train.nodes="
            f"{cluster.train.nodes} and train.num_processes={config.train.num_processes}, got "
            f"{config.train.packs_per_step}"
        )
    if cluster.train.gpus and config.train.num_processes > cluster.train.gpus:
        raise ValueError(
            f"train.num_processes must be at most cluster.train.gpus={cluster.train.gpus}, a process a GPU, got "
            f"{config.train.num_processes}"
        )
    if config.synthesize.num_shards > 1 or config.dump.num_writers > 1:
        raise ValueError(
            "synthesize.num_shards and dump.num_writers are set by cluster.synthesize.tasks and cluster.dump.tasks: "
            "leave them out"
        )
    _check_server(config)
    _check_text(config, cluster)


def _check_job(stage: str, options: JobConfig, warn_s: int) -> None:
    for name in ("tasks", "nodes", "cpus", "at_once"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"cluster.{stage}.{name} must be at least 1, got {value}")
    if options.nodes > 1 and stage != "train":
        raise ValueError(f"cluster.{stage}.nodes must be 1, got {options.nodes}: only training spreads over nodes")
    if options.tasks > 1 and stage not in (SERVER, "synthesize", "dump"):
        raise ValueError(f"cluster.{stage}.tasks must be 1, got {options.tasks}: {stage} is one job")
    if options.hours <= 0 or options.gpus < 0 or (options.memory_gib or 0) < 0:
        raise ValueError(f"cluster.{stage}.hours must be above 0, gpus and memory_gib at least 0")
    if options.hours * 3600 <= warn_s:
        raise ValueError(
            f"cluster.{stage}.hours must be more than cluster.warn_s={warn_s} seconds, or it is told to stop from its "
            f"start, got {options.hours}"
        )


def _check_server(config: Config) -> None:
    server = config.cluster.server
    if (server.kind is ServerKind.custom) != bool(server.command):
        raise ValueError("cluster.server.command must be given with cluster.server.kind=custom, and only then")
    if server.kind is ServerKind.none:
        return
    if config.synthesize.by_servers:
        raise ValueError(
            "synthesize.endpoints and servers must be empty with cluster.server.kind, which names the servers itself"
        )
    if server.kind is not ServerKind.custom:
        if served_model(config) == "embedded":
            raise ValueError("verifier.path must be a checkpoint that cluster.server.kind can serve, got embedded")
        _check_server_sizes(config)
    if server.command and not any("{port}" in word for word in server.command):
        raise ValueError("cluster.server.command must say {port} where the server takes its port")
    if secret := [word for word in [*server.command, *server.options] if re.match(r"--api[-_]key", word)]:
        raise ValueError(
            f"cluster.server must not have {secret[0].partition('=')[0]}, job files hold no keys: the environment of "
            "fledge submit goes to its jobs (VLLM_API_KEY, and OPENAI_API_KEY for who asks)"
        )


def _check_server_sizes(config: Config) -> None:
    server, answer = config.cluster.server, config.synthesize.max_tokens
    shared = server.tensor_parallel
    if shared is not None and (shared < 1 or server.gpus % shared):
        raise ValueError(
            f"cluster.server.tensor_parallel must divide cluster.server.gpus={server.gpus}, or be null for all, "
            f"got {shared}"
        )
    if server.kind is ServerKind.trtllm and server_copies(server) > 1:
        raise ValueError(
            f"cluster.server.tensor_parallel must be cluster.server.gpus={server.gpus} with kind=trtllm, which serves "
            f"one copy, got {shared}: start more servers (cluster.server.tasks) with fewer GPUs"
        )
    if server.max_length is not None and server.max_length <= answer:
        raise ValueError(
            f"cluster.server.max_length must be above synthesize.max_tokens={answer}, prompts come on top, "
            f"got {server.max_length}"
        )


def _check_text(config: Config, cluster: ClusterConfig) -> None:
    for where, env in (("cluster.env", cluster.env), ("cluster.server.env", cluster.server.env)):
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"{where}: {name!r} is no name of a variable")
            if _SECRET.search(name) and not value.startswith("$"):
                raise ValueError(
                    f"{where}.{name} must not be given, job files hold no keys: set it where fledge submit is started, "
                    "whose environment goes to the jobs"
                )
    texts = [config.name, config.runs_dir, *cluster.env.values(), *cluster.sbatch, *cluster.server.options]
    if broken := [text for text in texts if "\n" in text]:
        raise ValueError(f"names, paths and options of jobs must be one line each, got {broken[0]!r}")
