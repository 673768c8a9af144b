"""Job files: what a stage needs of Slurm and of the node, put into the templates of this package."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ...conf.runtime.launch import STAGES
from ...conf.schema import ClusterConfig, Config, ContainerKind, HiddenStates, JobConfig, ServerConfig, ServerKind

TEMPLATES = Path(__file__).with_name("templates")
COMMON = "common.sh"  # what job files source
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
        """Give its name in the folder of the submission."""
        return f"{self.stage}.sbatch"


def stage_before(stage: str, stages: Sequence[str]) -> str | None:
    """Give which of the stages submitted, in their order, a stage waits for: export needs a head, no evaluation."""
    before = [name for name in stages[: stages.index(stage)] if (name, stage) != ("evaluate", "export")]
    return before[-1] if before else None


def render_jobs(config: Config, folder: Path) -> list[Job]:
    """Give the job files of the stages of `submit.stages`, in their order, for a submission in `folder`."""
    stages = [stage for stage in STAGES if stage in config.submit.stages]
    if "synthesize" in stages and config.cluster.server.kind is not ServerKind.none:
        stages.insert(0, SERVER)
    return [_render(config, folder, stage, stages) for stage in stages]


def _render(config: Config, folder: Path, stage: str, stages: list[str]) -> Job:
    cluster = config.cluster
    options: JobConfig = getattr(cluster, stage)
    tasks = _tasks(config, stage) if stage in _ARRAYS else None
    before = stage_before(stage, stages)
    artifact, grows = _progress(config, stage)
    is_server = stage == SERVER
    values = {
        "about": f"Stage {stage} of run {config.name}."
        if not is_server
        else f"The verifier's servers of {config.name}.",
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
        "srun": " ".join(_srun(config, options, is_server)),
        "inside": " ".join(_inside(config, options, is_server)),
        "module": _module(config, stage),
        "arguments": "".join(f" {argument}" for argument in _arguments(config, stage, tasks, SERVER in stages)),
        "command": " ".join(_server_command(config)) if is_server else "",
    }
    template = _environment().get_template("server.sbatch" if is_server else "stage.sbatch")
    return Job(stage, tasks, template.render(values))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"quote": quoted, "expand": expand}
    return environment


def expand(value: str) -> str:
    """Quote for the shell, variables left to it: `$USER`, but no command."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'([\\`"])', r"\\\1", value)
    return '"' + re.sub(r"\$(?![A-Za-z_{])", r"\\$", escaped) + '"'


def quoted(value: str) -> str:
    """Quote for the shell as it is; what looks like a variable in plain quotes would be taken for a mistake."""
    return f'"{_literal(value)}"' if re.search(r"[$`]", value) else shlex.quote(value)


def directive(name: str, value: object) -> str:
    """Give an option as an #SBATCH line has it, in Slurm's own quoting."""
    text = str(value)
    return f"--{name}={text}" if _PLAIN.fullmatch(text) else f'--{name}="{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _tasks(config: Config, stage: str) -> int:
    """Give the tasks of an array: tokens alone, for online training, are written by one."""
    if stage == "dump" and config.train.hidden_states is HiddenStates.online:
        return 1
    tasks: int = getattr(config.cluster, stage).tasks
    return tasks


def _directives(config: Config, folder: Path, stage: str, options: JobConfig, tasks: int | None) -> list[str]:
    cluster = config.cluster
    gpus = f"{cluster.gpu_type}:{options.gpus}" if cluster.gpu_type else str(options.gpus)
    seconds = round(options.hours * 3600)
    given = {
        "job-name": f"{config.name}-{stage}",
        "output": f"{folder}/logs/{stage}-".replace("%", "%%") + ("%A_%a.log" if tasks else "%j.log"),
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
    return [
        *(directive(name, value) for name, value in given.items() if value is not None),
        "--requeue",
        *cluster.sbatch,
    ]


def _progress(config: Config, stage: str) -> tuple[Path, str]:
    return {
        SERVER: (config.conversations_folder, "*.jsonl"),
        "synthesize": (config.conversations_folder, "*.jsonl"),
        "dump": (config.hidden_states_folder, "*-*.safetensors"),
        "train": (config.training_folder / "checkpoints", "step-*"),
        "evaluate": (config.run_folder / "evaluation", "questions.jsonl"),
        "export": (config.run_folder / "exports", "manifest.json"),
    }[stage]


def mounted_paths(config: Config) -> list[str]:
    """Give the absolute paths that a configuration names, for a container to have, but those that its mounts bring."""
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


def _srun(config: Config, options: JobConfig, is_server: bool) -> list[str]:
    """Give the options of a step, quoted: a task a node, of which the others may still end well when one has ended."""
    cluster = config.cluster
    container = cluster.container
    given = [
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={options.cpus}",
        "--kill-on-bad-exit=0",
        f"--wait={_WAIT_S}",
    ]
    image = _image(cluster, is_server)
    if container.kind is ContainerKind.pyxis and image:
        named = [f"{_literal(path)}:{_literal(path)}" for path in mounted_paths(config)]
        mounts = "".join(f",{mount}" for mount in [*named, *map(_double_quoted, container.mounts)])
        given += [
            f"--container-image={quoted(image)}",
            f'--container-mounts="$PWD:$PWD,$jobs:$jobs,${{jobs%/jobs/*}}:${{jobs%/jobs/*}}{mounts}"',
            '--container-workdir="$PWD"',
        ]
    return given + [quoted(option) for option in cluster.srun]


def _double_quoted(text: str) -> str:
    return expand(text).removeprefix('"').removesuffix('"')


def _literal(text: str) -> str:
    """Give a text as it stands in double quotes, nothing of it left to the shell."""
    return re.sub(r'([\\`"$])', r"\\\1", text)


def _inside(config: Config, options: JobConfig, is_server: bool) -> list[str]:
    """Give the command, quoted, that enters a container; nothing where srun does."""
    container, image = config.cluster.container, _image(config.cluster, is_server)
    if container.kind is not ContainerKind.apptainer or not image:
        return []
    own = ["$PWD", "${jobs%/jobs/*}", *map(_literal, mounted_paths(config))]
    mounts = [f'--bind "{mount}"' for mount in [*own, *map(_double_quoted, container.mounts)]]
    return ["apptainer exec", *(["--nv"] if options.gpus else []), *mounts, '--pwd "$PWD"', quoted(image)]


def _image(cluster: ClusterConfig, is_server: bool) -> str | None:
    return (cluster.server.image if is_server else None) or cluster.container.image


def _module(config: Config, stage: str) -> str:
    """Give the Python module that a task of a stage runs: itself, or what starts several processes."""
    processes = _processes(config, stage)
    several = processes > 1 or getattr(config.cluster, stage).nodes > 1
    return f"fledge.slurm.jobs.node {processes}" if several else "fledge"


def _processes(config: Config, stage: str) -> int:
    """Give the processes of a node: a verifier held together by several is started as they are."""
    if stage == "train":
        return config.train.num_processes
    together = stage == "dump" and config.verifier.tensor_parallel
    return max(1, config.cluster.dump.gpus) if together else 1


def _arguments(config: Config, stage: str, tasks: int | None, with_servers: bool) -> list[str]:
    """Give the overrides of a stage, quoted: which part is this task's, and who answers."""
    task = '"$SLURM_ARRAY_TASK_ID"'
    if stage == "synthesize":
        asked = [_ADDRESSES] if with_servers else []
        return [f"synthesize.shard={task}", f"synthesize.num_shards={tasks}", *asked]
    return [f"dump.writer={task}", f"dump.num_writers={tasks}"] if stage == "dump" else []


def served_model(config: Config) -> str:
    """Give what the servers load: the verifier, or its copy in other numbers that `synthesize.model` names."""
    return config.synthesize.model or config.verifier.path


def server_copies(server: ServerConfig) -> int:
    """Give the copies of the verifier that the GPUs of one server hold."""
    return server.gpus // server.tensor_parallel if server.gpus and server.tensor_parallel else 1


def _server_sizes(server: ServerConfig) -> list[str]:
    """Give the GPUs of a copy, the copies and the longest conversation in an engine's words."""
    shared, copies, length = _SIZES[server.kind]
    several = server_copies(server)
    given = {
        shared: server.gpus // several if server.gpus else None,
        copies: several if several > 1 else None,
        length: server.max_length,
    }
    return [word for name, value in given.items() if value is not None for word in (name, str(value))]


def _server_command(config: Config) -> list[str]:
    """Give the server's command, quoted."""
    server, model = config.cluster.server, quoted(served_model(config))
    options = [expand(option) for option in server.options]
    where = ["--host", "0.0.0.0", "--port", '"$port"']
    if server.kind in _SERVERS:
        return [_SERVERS[server.kind], model, *where, *_server_sizes(server), *options]
    words = [expand(word.replace("{model}", served_model(config))) for word in server.command]
    return [word.replace("{port}", "$port") for word in words] + options
