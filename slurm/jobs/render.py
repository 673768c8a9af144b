"""Job files: requirements of a stage on Slurm and on the node, put into the templates of this package."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ...conf.schema import STAGES, Config, ContainerKind, HiddenStates, JobConfig, ServerConfig, ServerKind
from .records import LOGS

TEMPLATES = Path(__file__).with_name("templates")
SERVER = "server"
# Where they write their addresses, quoted for Hydra.
_ADDRESSES = r'''"synthesize.servers='${jobs//\'/\\\'}/servers'"'''
_WAIT_S = 120  # for the other tasks of a step once one has ended
_ARRAYS = (SERVER, "synthesize", "dump")
_SERVERS = {
    ServerKind.vllm: "vllm serve",
    ServerKind.sglang: "python -m sglang.launch_server --model-path",
    ServerKind.trtllm: "trtllm-serve",
}
_SIZES = {  # the options of GPUs that share a copy, of copies, of the longest conversation
    ServerKind.vllm: ("--tensor-parallel-size", "--data-parallel-size", "--max-model-len"),
    ServerKind.sglang: ("--tp-size", "--dp-size", "--context-length"),
    ServerKind.trtllm: ("--tp_size", "", "--max_seq_len"),  # one copy a server
}
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass
class Job:
    """A job file, not yet submitted."""

    stage: str
    tasks: int | None  # of a job array; None: it is none
    text: str

    @property
    def file(self) -> str:
        """Name in the folder of the submission."""
        return f"{self.stage}.sbatch"


def stage_before(stage: str, stages: Sequence[str]) -> str | None:
    """Return which of the submitted stages, in their order, a stage waits for: export needs a head, no evaluation."""
    before = [name for name in stages[: stages.index(stage)] if (name, stage) != ("evaluate", "export")]
    return before[-1] if before else None


def render_jobs(config: Config, folder: Path) -> list[Job]:
    """Return the job files of the stages of `submit.stages`, in their order, for a submission in `folder`."""
    stages = [stage for stage in STAGES if stage in config.submit.stages]
    if "synthesize" in stages and config.cluster.server.kind is not ServerKind.none:
        stages.insert(0, SERVER)
    return [_render(config, folder, stage, stages) for stage in stages]


def _render(config: Config, folder: Path, stage: str, stages: list[str]) -> Job:
    cluster, is_server = config.cluster, stage == SERVER
    options: JobConfig = getattr(cluster, stage)
    tasks = options.tasks if stage in _ARRAYS else None
    if stage == "dump" and config.train.hidden_states is HiddenStates.online:
        tasks = 1  # tokens alone are written by one
    before = stage_before(stage, stages)
    artifact, grows = _progress(config, stage)
    image = (cluster.server.image if is_server else None) or cluster.container.image
    values = {
        "about": f"The verifier's servers of {config.name}." if is_server else f"Stage {stage} of run {config.name}.",
        "after": f"{before}{' has begun' if before == SERVER else ' has ended well'}" if before else "",
        "file": str(folder / f"{stage}.sbatch"),
        "folder": str(folder),
        "directives": _directives(config, folder, stage, options, tasks),
        "artifact": str(artifact),
        "grows": grows,
        "cluster": cluster,
        "venv": (cluster.server.venv if is_server else None) or cluster.venv,
        "env": {**cluster.env, **(cluster.server.env if is_server else {})},
        "stage": stage,
        "is_array": tasks is not None,
        "waits_for_servers": stage == "synthesize" and SERVER in stages,
        "address": cluster.address if is_server or options.nodes > 1 else None,
        "srun": " ".join(_srun(config, options, image)),
        "inside": " ".join(_inside(config, options, image)),
        "module": _module(config, stage),
        "arguments": "".join(f" {argument}" for argument in _arguments(stage, tasks, SERVER in stages)),
        "command": " ".join(_server_command(config)) if is_server else "",
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"quote": quoted, "expand": expand}
    template = environment.get_template("server.sbatch" if is_server else "stage.sbatch")
    return Job(stage, tasks, template.render(values))


def expand(value: str) -> str:
    """Quote for the shell, variables left to it: `$USER`, but no command."""
    return value if _PLAIN.fullmatch(value) else f'"{_variables(value)}"'


def _variables(value: str) -> str:
    """Return a text for double quotes, variables left to the shell."""
    return re.sub(r"\$(?![A-Za-z_{])", r"\\$", re.sub(r'([\\`"])', r"\\\1", value))


def _literal(text: str) -> str:
    """Return a text for double quotes, nothing of it left to the shell."""
    return re.sub(r'([\\`"$])', r"\\\1", text)


def quoted(value: str) -> str:
    """Quote for the shell as it is; what looks like a variable in plain quotes would be taken for a mistake."""
    return f'"{_literal(value)}"' if re.search(r"[$`]", value) else shlex.quote(value)


def directive(name: str, value: object) -> str:
    """Return an option as an #SBATCH line has it, in Slurm's own quoting."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"--{name}={text}"


def _directives(config: Config, folder: Path, stage: str, options: JobConfig, tasks: int | None) -> list[str]:
    cluster = config.cluster
    gpus = f"{cluster.gpu_type}:{options.gpus}" if cluster.gpu_type else str(options.gpus)
    seconds = round(options.hours * 3600)
    values = {
        "job-name": f"{config.name}-{stage}",
        "output": f"{folder}/{LOGS}/{stage}-".replace("%", "%%") + ("%A_%a.log" if tasks else "%j.log"),
        "open-mode": "append",
        "partition": options.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "array": f"0-{tasks - 1}" + (f"%{options.at_once}" if options.at_once else "") if tasks else None,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": options.cpus,
        "mem": None if options.memory_gib is None else f"{options.memory_gib}G" if options.memory_gib else 0,
        cluster.gpu_request: (f"gpu:{gpus}" if cluster.gpu_request == "gres" else gpus) if options.gpus else None,
        "time": f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        "signal": f"B:USR1@{cluster.warn_s}",
        "kill-on-invalid-dep": "yes",
    }
    named = [directive(name, value) for name, value in values.items() if value is not None]
    return [*named, "--requeue", *cluster.sbatch]


def _progress(config: Config, stage: str) -> tuple[Path, str]:
    """Return a folder and the files in it that grow while a stage gets on."""
    return {
        SERVER: (config.conversations_folder, "*.jsonl"),
        "synthesize": (config.conversations_folder, "*.jsonl"),
        "dump": (config.hidden_states_folder, "*-*.safetensors"),
        "train": (config.training_folder / "checkpoints", "step-*"),
        "evaluate": (config.run_folder / "evaluation", "questions.jsonl"),
        "export": (config.run_folder / "exports", "manifest.json"),
    }[stage]


def mounted_paths(config: Config) -> list[str]:
    """Return the absolute paths that options name, for a container to have, but those that its mounts bring."""
    named = [
        config.runs_dir,
        config.verifier.path,
        config.synthesize.model,
        config.dump.folder,
        *(store.folder for store in config.train.stores),
        *(source.path for source in config.data.sources),
        *config.data.exclude,
        config.train.init_from,
        config.evaluate.questions,
        config.evaluate.checkpoint,
        config.export.checkpoint,
    ]
    paths = list(dict.fromkeys(Path(path) for path in named if path and Path(path).is_absolute()))
    inside = [Path(mount.split(":")[1]) for mount in config.cluster.container.mounts if ":" in mount]
    return [str(path) for path in paths if path not in inside and not {*paths, *inside} & {*path.parents}]


def _srun(config: Config, options: JobConfig, image: str | None) -> list[str]:
    """Return the options of a step, quoted: a task a node; when one has ended, the others may still end well."""
    container = config.cluster.container
    words = [f"--nodes={options.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={options.cpus}"]
    words += ["--kill-on-bad-exit=0", f"--wait={_WAIT_S}"]
    if container.kind is ContainerKind.pyxis and image:
        named = [f"{_literal(path)}:{_literal(path)}" for path in mounted_paths(config)]
        mounts = ["$PWD:$PWD", "$jobs:$jobs", "${jobs%/jobs/*}:${jobs%/jobs/*}", *named]
        words += [f"--container-image={quoted(image)}"]
        words += [f'--container-mounts="{",".join([*mounts, *map(_variables, container.mounts)])}"']
        words += ['--container-workdir="$PWD"']
    return words + [quoted(option) for option in config.cluster.srun]


def _inside(config: Config, options: JobConfig, image: str | None) -> list[str]:
    """Return the command, quoted, that enters a container; nothing if srun does."""
    container = config.cluster.container
    if container.kind is not ContainerKind.apptainer or not image:
        return []
    paths = ["$PWD", "${jobs%/jobs/*}", *map(_literal, mounted_paths(config)), *map(_variables, container.mounts)]
    mounts = [f'--bind "{path}"' for path in paths]
    return ["apptainer exec", *(["--nv"] if options.gpus else []), *mounts, '--pwd "$PWD"', quoted(image)]


def _module(config: Config, stage: str) -> str:
    """Return the Python module that a task of a stage runs: itself, or what starts several processes of a node."""
    processes = 1
    if stage == "train":
        processes = config.train.num_processes
    elif stage == "dump" and config.verifier.tensor_parallel:  # ranks hold one verifier together
        processes = max(1, config.cluster.dump.gpus)
    several = processes > 1 or getattr(config.cluster, stage).nodes > 1
    return f"fledge.slurm.jobs.node {processes}" if several else "fledge"


def _arguments(stage: str, tasks: int | None, with_servers: bool) -> list[str]:
    """Return the overrides of a stage, quoted: which part is this task's, and who answers."""
    part, parts = {"synthesize": ("shard", "num_shards"), "dump": ("writer", "num_writers")}.get(stage, ("", ""))
    words = [f'{stage}.{part}="$SLURM_ARRAY_TASK_ID"', f"{stage}.{parts}={tasks}"] if part else []
    return words + ([_ADDRESSES] if stage == "synthesize" and with_servers else [])


def served_model(config: Config) -> str:
    """Return what the servers load: the verifier, or its copy in other numbers that `synthesize.model` names."""
    return config.synthesize.model or config.verifier.path


def server_copies(server: ServerConfig) -> int:
    """Return how many copies of the verifier the GPUs of one server hold."""
    return server.gpus // server.tensor_parallel if server.gpus and server.tensor_parallel else 1


def _server_sizes(server: ServerConfig) -> list[str]:
    """Return the GPUs of a copy, the copies and the longest conversation in an engine's words."""
    copies = server_copies(server)
    sizes = (server.gpus // copies if server.gpus else None, copies if copies > 1 else None, server.max_length)
    pairs = zip(_SIZES[server.kind], sizes, strict=True)
    return [word for name, value in pairs if value is not None for word in (name, str(value))]


def _server_command(config: Config) -> list[str]:
    """Return the server's command, quoted."""
    server, model = config.cluster.server, served_model(config)
    options = [expand(option) for option in server.options]
    if server.kind in _SERVERS:
        address = ["--host", "0.0.0.0", "--port", '"$port"']
        return [_SERVERS[server.kind], quoted(model), *address, *_server_sizes(server), *options]
    words = [expand(word.replace("{model}", model)) for word in server.command]
    return [word.replace("{port}", "$port") for word in words] + options
