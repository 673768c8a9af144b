"""Write constraints.txt: every package, pinned, that pip chooses for fledge with its extras.

    python tests/tools/make_constraints.py              # pins stay, new requirements are added
    python tests/tools/make_constraints.py --upgrade    # the newest that fit

Nothing is installed. A local version (+cpu) is left out: each machine has its own build of torch.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "constraints.txt"
HEADER = "# Versions fledge is tested with (tests/tools/make_constraints.py): pip install -c constraints.txt -e .\n"


def text(report: dict) -> str:
    """Return the pins of a report of `pip install --report`."""
    pins = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    pins = {name.lower().replace("_", "-"): version.partition("+")[0] for name, version in pins.items()}
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()) if name != "fledge-eagle")


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += [] if "--upgrade" in sys.argv else ["-c", str(PAGE)]
    done = subprocess.run([*command, "torch", "-e", f"{ROOT}[dev]"], stdout=subprocess.PIPE, text=True, check=True)
    PAGE.write_text(text(json.loads(done.stdout)))
