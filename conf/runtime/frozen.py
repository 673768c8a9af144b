"""A configuration in a file, every option resolved: jobs and stages have it whatever the groups say by then."""

from pathlib import Path

from omegaconf import OmegaConf

from ..schema import Config
from .artifact import write_atomic

FROZEN = "frozen"  # a command takes it by --config-dir and --config-name frozen
_HEAD = """# A configuration, resolved: every option, whatever the groups say by now.
defaults:
  - schema
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
  - _self_

hydra:
  run:
    dir: .
  output_subdir: null
  job:
    chdir: false

"""


def freeze_options(config: Config, folder: Path) -> None:
    """Write every option, resolved, as frozen.yaml into a folder."""
    options = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    write_atomic(folder / f"{FROZEN}.yaml", _HEAD + options)
