"""What the parent of forked commands imports (commands.py)."""

import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the commands set it before they import DeepSpeed
for module in (
    "conf.cli",
    "data_synthesis.dump",
    "data_synthesis.synthesize",
    "eval.evaluate",
    "models.export",
    "train.setup",
):
    importlib.import_module(f"fledge.{module}")
