"""What the parent of forked commands imports (commands.py)."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the commands set it before they import DeepSpeed
