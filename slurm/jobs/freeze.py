"""Copies of configuration and code next to the jobs, as they were when these were submitted."""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ... import __version__
from ...conf.runtime.artifact import write_atomic
from ...conf.schema import Config
from ...train.metrics.tracking import git_state
from .render import TEMPLATES

PACKAGE = Path(__file__).parents[2]
FROZEN = "frozen"  # the configuration that jobs take: --config-name frozen


def freeze(config: Config, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Write configuration and code into the folder of a submission; return what is to be recorded of them."""
    options = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    write_atomic(folder / f"{FROZEN}.yaml", (TEMPLATES / "frozen.yaml").read_text() + options)
    target = folder / "code" / "fledge"  # templates/head.sh puts code/ on PYTHONPATH
    target.mkdir(parents=True)
    for entry in sorted(PACKAGE.iterdir()):  # tests, environments and runs may lie next to the modules
        if entry.is_file() and entry.suffix == ".py":
            shutil.copy2(entry, target)
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return {"fledge": __version__, "overrides": overrides, "git": git_state(PACKAGE)}
