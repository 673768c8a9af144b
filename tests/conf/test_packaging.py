"""What is installed is what is here."""

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import fledge
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_folder_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {Path(line).parent for line in tracked.stdout.splitlines() if not line.startswith("tests/")}
    assert listed == {".".join(("fledge", *folder.parts)) for folder in folders}


def test_hints_name_the_distribution_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [path.read_text() for path in map(ROOT.joinpath, tracked) if path.suffix in (".py", ".md", ".toml", ".yml")]
    extras = [found for text in texts for found in re.findall(r"\bfledge(?:-eagle)?\[\w[\w,-]*\]", text)]
    assert len(extras) >= 4
    for hint in extras:
        name, _, listed = hint.rstrip("]").partition("[")
        assert name == project["name"], hint
        assert set(listed.split(",")) <= set(project["optional-dependencies"]), hint


def test_the_wheel_installs_in_a_fresh_environment_and_works(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    copy = tmp_path / "source"  # building writes beside the sources
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True)
    wheel = next(tmp_path.glob("fledge_eagle-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The dependencies are borrowed from this environment; .pth files in it (the editable install) are not followed.
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", str(wheel)], check=True
    )
    command = str(tmp_path / "venv" / "bin" / "fledge")

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert all((site / "fledge" / name).is_file() for name in ("py.typed", "eval/figures/report.html"))
    assert str(site) in output(str(python), "-c", "import fledge; print(fledge.__file__)")
    assert "fledge COMMAND" in output(command, "--help")
    metadata = output(str(python), "-m", "pip", "show", "fledge-eagle")
    assert f"Version: {output(command, '--version').strip()}" in metadata
    assert "path: embedded" in output(command, "train", "--cfg", "job", "experiment=demo", "name=x")
    top_level = {path.name for path in site.iterdir()}
    assert not top_level & {"models", "eval", "train", "conf", "tests", "slurm", "data_synthesis"}


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, _, version in lines}
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, listed):
        name = canonicalize_name(requirement.name)
        assert name == project["name"] or requirement.specifier.contains(pins[name]), requirement


def test_hooks_pipelines_and_changelog_are_of_this_project():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:  # the ruff that runs the tests, in place of .venv's
        command = hook["entry"].replace(".venv/bin/", str(Path(sys.executable).parent) + "/").split()
        subprocess.run([*command, "conf/errors.py"], cwd=ROOT, check=True, capture_output=True)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": "bash .ci/run"} in jobs["test"]["steps"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {version}" in classifiers for version in versions)
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == fledge.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert "make .venv/.installed" in container["postCreateCommand"]
