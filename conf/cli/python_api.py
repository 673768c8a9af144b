"""Configurations and whole runs from Python: `fledge.load_config` and `fledge.run`."""

import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import explain
from ..runtime import launch
from ..runtime.frozen import FROZEN, freeze_options
from ..runtime.signals import answered
from ..schema import Config
from ..schema.free_names import with_free_names
from . import checked


def load_config(*overrides: str, file: str | Path | None = None) -> Config:
    """Return the configuration that a command has with these overrides, such as "experiment=demo" and "name=first".

    Args:
        file: a run's `training/config.yaml`, whose options take the place of groups and defaults.

    Raises ValueError as the command does: the option, what is required, the value.
    """
    try:
        if file is None:
            ConfigStore.instance().store(name="schema", node=Config)
            with initialize_config_module("fledge.conf", version_base="1.3"):
                composed: Any = compose("config", overrides=with_free_names(list(overrides)))
        else:
            dotted = OmegaConf.from_dotlist(list(overrides))
            composed = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file), dotted)
        return checked(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from None


def run(config: Config) -> Path:
    """Run every stage as `fledge run` does, each in a process of its own; return the run's folder.

    What is complete is skipped. RuntimeError: a stage has failed, and said why; called again, it goes on there.
    """
    with tempfile.TemporaryDirectory() as folder:
        freeze_options(config, Path(folder))
        try:
            with answered("run"):
                launch.run(config, ["--config-dir", folder, "--config-name", FROZEN])
        except SystemExit as ended:
            raise RuntimeError(
                f"fledge.run ended with exit code {ended.code}; called again, it goes on there"
            ) from None
    return config.run_folder
