"""What no job could do is refused before anything is submitted; a submission is frozen, with its code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import composed
from commands import fledge
from fledge.conf.schema import Config, ContainerConfig, ContainerKind, ServerKind, SourceConfig
from fledge.slurm.jobs.records import freeze
from fledge.slurm.submit import check_cluster
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]


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
    pages = [ROOT / "README.md", ROOT / "conf" / "cli" / "help.py", *(ROOT / "docs").rglob("*.md")]
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
        (["cluster=one_machine", "verifier.tensor_parallel=true"], ["cluster.dump.gpus must be above 1"]),
        (["cluster=slurm_gpu", "verifier.tensor_parallel=true"], ["evaluate must be left out of submit.stages"]),
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
