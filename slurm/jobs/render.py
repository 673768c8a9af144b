"""Job files: requirements of a stage on Slurm and on the node, put into the templates of this package."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ...conf.schema import STAGES, Config, HiddenStates, JobConfig, ServerConfig, ServerKind

TEMPLATES = Path(__file__).with_name("templates")
SERVER = "server"
_ARRAYS = (SERVER, "synthesize", "dump")
_ENGINES = {  # the command, and its options of GPUs that share a copy, of copies, of the longest conversation
    ServerKind.vllm: ("vllm serve", "--tensor-parallel-size", "--data-parallel-size", "--max-model-len"),
    ServerKind.sglang: ("python -m sglang.launch_server --model-path", "--tp-size", "--dp-size", "--context-length"),
    ServerKind.trtllm: ("trtllm-serve", "--tp_size", "", "--max_seq_len"),  # one copy a server
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
    artifact, grows = _progress(config, stage)
    values = {
        "config": config,
        "cluster": cluster,
        "options": options,
        "stage": stage,
        "tasks": tasks,
        "before": stage_before(stage, stages),
        "file": folder / f"{stage}.sbatch",
        "folder": folder,
        "artifact": artifact,
        "grows": grows,
        "venv": (cluster.server.venv if is_server else None) or cluster.venv,
        "env": {**cluster.env, **(cluster.server.env if is_server else {})},
        "image": (cluster.server.image if is_server else None) or cluster.container.image,
        "mounted": mounted_paths(config),
        "seconds": round(options.hours * 3600),
        "waits_for_servers": stage == "synthesize" and SERVER in stages,
        "processes": _processes(config, stage),
        "command": " ".join(_server_command(config)) if is_server else "",
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"quote": quoted, "expand": expand, "literal": literal, "variables": variables}
    environment.filters["slurm"] = for_slurm
    return Job(stage, tasks, environment.get_template(f"{SERVER if is_server else 'stage'}.sbatch").render(values))


def variables(value: object) -> str:
    """Return a text for double quotes, variables left to the shell."""
    return re.sub(r"\$(?![A-Za-z_{])", r"\\$", re.sub(r'([\\`"])', r"\\\1", str(value)))


def literal(value: object) -> str:
    """Return a text for double quotes, nothing of it left to the shell."""
    return re.sub(r'([\\`"$])', r"\\\1", str(value))


def expand(value: object) -> str:
    """Quote for the shell, variables left to it: `$USER`, but no command."""
    return str(value) if _PLAIN.fullmatch(str(value)) else f'"{variables(value)}"'


def quoted(value: object) -> str:
    """Quote for the shell as it is; what looks like a variable in plain quotes would be taken for a mistake."""
    return f'"{literal(value)}"' if re.search(r"[$`]", str(value)) else shlex.quote(str(value))


def for_slurm(value: object) -> str:
    """Quote the value of an option in an #SBATCH line, as Slurm itself reads quotes."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _progress(config: Config, stage: str) -> tuple[Path, str]:
    """Return a folder and the files in it that grow while a stage gets on."""
    return {
        SERVER: (config.run_folder, "*.jsonl"),  # prompts that it writes, and conversations
        "synthesize": (config.run_folder, "*.jsonl"),
        "dump": (config.hidden_states_folder, "*-*.safetensors"),
        "train": (config.training_folder / "checkpoints", "step-*"),
        "evaluate": (config.run_folder / "evaluation", "questions.jsonl"),
        "export": (config.run_folder / "exports", "manifest.json"),
    }[stage]


def mounted_paths(config: Config) -> list[str]:
    """Return the absolute paths that options name, for a container to have, but those that its mounts bring."""
    named = [config.runs_dir, config.verifier.path, config.verifier.adapter, config.synthesize.model]
    named += [config.dump.folder, config.verifier.merged_dir if config.verifier.adapter else None]
    named += [*(store.folder for store in config.train.stores), *(source.path for source in config.data.sources)]
    named += [*config.data.exclude, config.train.init_from, config.evaluate.questions]
    named += [config.evaluate.checkpoint, config.export.checkpoint, config.evaluate.context_documents]
    named += [str(Path(history).parent)] if (history := config.evaluate.history) else []
    paths = list(dict.fromkeys(Path(path) for path in named if path and Path(path).is_absolute()))
    inside = [Path(mount.split(":")[1]) for mount in config.cluster.container.mounts if ":" in mount]
    return [str(path) for path in paths if path not in inside and not {*paths, *inside} & {*path.parents}]


def _processes(config: Config, stage: str) -> int:
    """Return the processes of a node: ranks of training, those that hold one verifier together, or copies of it."""
    if stage == "train":
        return config.train.num_processes
    if stage == "dump":
        return max(1, config.cluster.dump.gpus) if config.verifier.tensor_parallel else config.cluster.dump.processes
    return 1


def served_model(config: Config) -> str:
    """Return what the servers load: the verifier, or its copy in other numbers that `synthesize.model` names."""
    if config.synthesize.model:
        return config.synthesize.model
    if config.verifier.adapter is None:
        return config.verifier.path
    from ...models.verifier.config import verifier_location  # `fledge status` must not load its libraries

    return verifier_location(config.verifier, make=False)


def server_copies(server: ServerConfig) -> int:
    """Return how many copies of the verifier the GPUs of one server hold."""
    return server.gpus // server.tensor_parallel if server.gpus and server.tensor_parallel else 1


def _server_sizes(server: ServerConfig) -> list[str]:
    """Return the GPUs of a copy, the copies and the longest conversation in an engine's words."""
    copies = server_copies(server)
    sizes = (server.gpus // copies if server.gpus else None, copies if copies > 1 else None, server.max_length)
    pairs = zip(_ENGINES[server.kind][1:], sizes, strict=True)
    return [word for name, value in pairs if value is not None for word in (name, str(value))]


def _server_command(config: Config) -> list[str]:
    server, model = config.cluster.server, served_model(config)
    options = [expand(option) for option in server.options]
    if server.kind in _ENGINES:
        address = ["--host", "0.0.0.0", "--port", '"$port"']
        return [_ENGINES[server.kind][0], quoted(model), *address, *_server_sizes(server), *options]
    words = [expand(word.replace("{model}", model)) for word in server.command]
    return [word.replace("{port}", "$port") for word in words] + options
