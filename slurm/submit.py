"""`fledge submit`: a run as Slurm jobs, each of which begins when what it needs has ended well.

Everything of a submission is in runs/NAME/jobs/N/: job files, `frozen.yaml`, `code/`, `logs/`, what the jobs write
(`events/`, `servers/`, `restarts/`), and `submission.json`, which names the jobs.
"""

import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from ..conf.runtime.artifact import write_atomic
from ..conf.schema import STAGES, Config, ContainerKind, EvaluateEngine, JobConfig, ServerConfig, ServerKind, require
from ..models.verifier.config import verifier_location
from .jobs.queue import cancel, has_slurm, job_states, submit_file
from .jobs.records import JOBS, LOGS, JobRecord, freeze, read_submission, submissions, write_submission
from .jobs.render import SERVER, TEMPLATES, Job, mounted_paths, render_jobs, served_model, server_copies, stage_before
from .plan.verifier_shape import planned_head

_SECRET = re.compile(r"(^|_)((API|ACCESS)?KEY|TOKEN|SECRET|PASS\w*)$", re.IGNORECASE)


def submit(config: Config) -> None:
    """Submit the stages of a run; with `submit.dry_run` print their job files."""
    check_cluster(config)
    try:
        planned_head(config)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError) or Path(config.verifier.path).exists():
            raise
        print(f"submit: the first job checks the verifier, which is not at hand here: {error}", file=sys.stderr)
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
    verifier_location(config.verifier)  # servers begin with the merged folder
    folder.mkdir(parents=True)
    if config.dump.folder and config.cluster.container.kind is not ContainerKind.none:
        config.hidden_states_folder.mkdir(parents=True, exist_ok=True)  # containers mount what is there
    (folder / LOGS).mkdir()  # or Slurm, which does not make it, lets the job fail
    about = freeze(config, folder, list(HydraConfig.get().overrides.task))
    shutil.copy2(TEMPLATES / "common.sh", folder)
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


def _chain(jobs: list[Job], folder: Path) -> dict[str, str]:
    """Submit job files one after the other; if one is refused, none stays."""
    ids: dict[str, str] = {}
    tasks = {job.stage: job.tasks or 1 for job in jobs}
    try:
        for job in jobs:
            before = stage_before(job.stage, list(tasks))
            dependency = f"afterok:{ids[before]}" if before else None
            if before == SERVER:  # any that has begun
                dependency = "?".join(f"after:{ids[SERVER]}_{task}" for task in range(tasks[SERVER]))
            ids[job.stage] = submit_file(folder / job.file, dependency)
    except BaseException:
        cancel(list(ids.values()))
        shutil.rmtree(folder)
        raise
    return ids


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
    """Check that jobs can do what the options ask of them; ValueError names the option."""
    cluster, train = config.cluster, config.train
    require(
        "evaluate" not in config.submit.stages or not config.evaluate.lacks_server,
        "evaluate.endpoint is required with evaluate.engine=server and evaluate among submit.stages: set "
        "submit.stages=[synthesize,dump,train,export], serve the verifier with the export, then "
        "`fledge evaluate ... evaluate.endpoint=http://HOST:8000/v1`",
    )
    if config.verifier.tensor_parallel:
        require(
            "dump" not in config.submit.stages or cluster.dump.gpus > 1,
            f"cluster.dump.gpus must be above 1 with verifier.tensor_parallel, got {cluster.dump.gpus}",
        )
        require(
            "evaluate" not in config.submit.stages or config.evaluate.engine is EvaluateEngine.server,
            "evaluate must be left out of submit.stages with verifier.tensor_parallel, unless a server answers "
            "(evaluate.engine=server)",
        )
    for stage in (SERVER, *STAGES):
        _check_job(stage, getattr(cluster, stage), cluster.warn_s)
    if (kind := cluster.container.kind) is not ContainerKind.none:
        image = f"cluster.container.image is required with cluster.container.kind={kind.value}"
        require(cluster.container.image, image)
        for path in mounted_paths(config):
            fits = not re.search("[:,]", path)
            require(fits, f"paths that containers mount must be without colons and commas, got {path}")
    ranks, gpus = train.num_processes * cluster.train.nodes, cluster.train.gpus
    require(
        train.packs_per_step % ranks == 0,
        f"train.packs_per_step must be a multiple of the {ranks} processes of cluster.train.nodes="
        f"{cluster.train.nodes} and train.num_processes={train.num_processes}, got {train.packs_per_step}",
    )
    most = f"train.num_processes must be at most cluster.train.gpus={gpus}, a process a GPU, got {train.num_processes}"
    require(not gpus or train.num_processes <= gpus, most)
    require(
        config.synthesize.num_shards == config.dump.num_writers == 1,
        "synthesize.num_shards and dump.num_writers are set by cluster.synthesize.tasks and cluster.dump.tasks: "
        "leave them out",
    )
    _check_server(config)
    _check_text(config)


def _check_job(stage: str, job: JobConfig, warn_s: int) -> None:
    name, is_spread, is_array = f"cluster.{stage}", stage == "train", stage in (SERVER, "synthesize", "dump")
    require(is_spread or job.nodes == 1, f"{name}.nodes must be 1, got {job.nodes}: only training spreads over nodes")
    require(is_array or job.tasks == 1, f"{name}.tasks must be 1, got {job.tasks}: {stage} is one job")
    long = f"{name}.hours must be more than cluster.warn_s={warn_s} seconds"
    require(job.hours * 3600 > warn_s, f"{long}, or it is told to stop from its start, got {job.hours}")


def _check_server(config: Config) -> None:
    server, is_custom = config.cluster.server, config.cluster.server.kind is ServerKind.custom
    command = "cluster.server.command must be given with cluster.server.kind=custom, and only then"
    require(is_custom == bool(server.command), command)
    if server.kind is ServerKind.none:
        return
    require(
        not config.synthesize.by_servers,
        "synthesize.endpoints and servers must be empty with cluster.server.kind, which names the servers itself",
    )
    if is_custom:
        has_port = any("{port}" in word for word in server.command)
        require(has_port, "cluster.server.command must say {port} where the server takes its port")
    else:
        can_serve = config.verifier.adapter or served_model(config) != "embedded"
        require(can_serve, "verifier.path must be a checkpoint that cluster.server.kind can serve, got embedded")
        _check_server_sizes(server, config.synthesize.max_tokens)
    if secret := [word for word in [*server.command, *server.options] if re.match(r"--api[-_]key", word)]:
        raise ValueError(
            f"cluster.server must not have {secret[0].partition('=')[0]}, job files hold no keys: the environment of "
            "fledge submit goes to its jobs (VLLM_API_KEY, and OPENAI_API_KEY for who asks)"
        )


def _check_server_sizes(server: ServerConfig, max_tokens: int) -> None:
    shared, gpus, length = server.tensor_parallel, server.gpus, server.max_length
    require(
        shared is None or gpus % shared == 0,
        f"cluster.server.tensor_parallel must divide cluster.server.gpus={gpus}, or be null for all, got {shared}",
    )
    require(
        server.kind is not ServerKind.trtllm or server_copies(server) == 1,
        f"cluster.server.tensor_parallel must be cluster.server.gpus={gpus} with kind=trtllm, which serves one copy, "
        f"got {shared}: start more servers (cluster.server.tasks) with fewer GPUs",
    )
    longer = f"cluster.server.max_length must be above synthesize.max_tokens={max_tokens}, prompts come on top"
    require(length is None or length > max_tokens, f"{longer}, got {length}")


def _check_text(config: Config) -> None:
    cluster = config.cluster
    variables = [("cluster.env", cluster.env), ("cluster.server.env", cluster.server.env)]
    for option, name, value in ((option, *variable) for option, env in variables for variable in env.items()):
        is_name = re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
        require(is_name, f"{option}: {name!r} is no name of a variable")
        require(
            value.startswith("$") or not _SECRET.search(name),
            f"{option}.{name} must not be given, job files hold no keys: set it where fledge submit is started, "
            "whose environment goes to the jobs",
        )
    texts = [config.name, config.runs_dir, *cluster.env.values(), *cluster.sbatch, *cluster.server.options]
    for text in texts:
        require("\n" not in text, f"names, paths and options of jobs must be one line each, got {text!r}")
