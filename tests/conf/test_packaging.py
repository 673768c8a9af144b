"""What is installed is what is here."""

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_folder_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {Path(line).parent for line in tracked.stdout.splitlines() if not line.startswith("tests/")}
    assert listed == {".".join(("fledge", *folder.parts)) for folder in folders}


def test_the_wheel_installs_in_a_fresh_environment_and_works(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    copy = tmp_path / "source"  # building writes beside the sources
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True)
    wheel = next(tmp_path.glob("fledge-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The dependencies are borrowed from this environment; .pth files in it (the editable install) are not followed.
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", str(wheel)], check=True
    )
    fledge = str(tmp_path / "venv" / "bin" / "fledge")

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert all((site / "fledge" / name).is_file() for name in ("py.typed", "eval/figures/report.html"))
    assert str(site) in output(str(python), "-c", "import fledge; print(fledge.__file__)")
    assert "fledge COMMAND" in output(fledge, "--help")
    assert "path: embedded" in output(fledge, "train", "--cfg", "job", "experiment=demo", "name=x")
    top_level = {path.name for path in site.iterdir()}
    assert not top_level & {"models", "eval", "train", "conf", "tests", "slurm", "data_synthesis"}
