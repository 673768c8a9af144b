"""The examples for clusters, docs/recipes/clusters.md, as far as they can be checked without one."""

import re
import shlex
import sys
from pathlib import Path

import yaml
from commands import run_command
from fledge.conf.runtime.signals import EXIT_AGAIN

ROOT = Path(__file__).resolve().parents[2]


def test_the_yaml_of_skypilot_and_ray_parses_and_the_stage_composes():
    page = (ROOT / "docs/recipes/clusters.md").read_text()
    sky, ray = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_AGAIN]
    name, *arguments = shlex.split(sky["run"].replace("$RUN", sky["envs"]["RUN"]))
    assert name == "fledge"
    assert f"runs_dir={next(iter(sky['file_mounts']))}" in arguments
    done = run_command([sys.executable, "-m", "fledge", *arguments, "--cfg", "job"])
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    assert (composed["name"], composed["train"]["num_processes"]) == ("first", 8)
    model = ray["applications"][0]["args"]["llm_configs"][0]["model_loading_config"]["model_id"]
    assert composed["verifier"]["path"] == model, "or synthesize.model is needed"
