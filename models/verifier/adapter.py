"""A verifier with a PEFT adapter (`verifier.adapter`), merged once into a folder that all stages and engines load."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ...conf.runtime.artifact import commit, digest, file_digest, held, sync, write_json
from ...conf.schema import VerifierConfig
from ..hub import fetch
from .config import MERGED, auto_class, checkpoint_file, from_checkpoint, load_whole_config
from .quantised import quantisation
from .weights import VerifierWeights

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md", "LICENSE*"]  # tokenizer, templates, ...
_WARNINGS = ("Found missing adapter keys", "Model with `tie_word_embeddings=True`")  # after which the model is wrong


@cache
def merged_folder(path: str, revision: str | None, adapter: str, merged_dir: str, make: bool = True) -> Path:
    """Return the folder of a verifier with the adapter merged into it; it is made at first use, on the CPU.

    Its name tells what is in it: the weights, configuration and tokenizer of the verifier, and the adapter. The merged
    weights have the type of the verifier's checkpoint; tokenizer and chat template are the verifier's.

    Args:
        path: the base model, a folder or hub id.
        revision: of it on the hub.
        adapter: folder or hub id of the adapter.
        merged_dir: where the folder is.
        make: whether to merge, if it is not there.

    Raises:
        ValueError: either is not there or cannot be merged, PEFT is not installed, or the folder cannot be written.
    """
    base, source = VerifierConfig(path, revision), _adapter_folder(adapter)
    small = _small_files(base)
    content = [VerifierWeights(base).fingerprint(), *(file_digest(source / name) for name in (_CONFIG, _WEIGHTS))]
    key = digest([content, {file.name: file_digest(file) for file in small}])
    folder = Path(merged_dir).resolve() / f"{Path(path).name}-{key}"
    if folder.is_dir() or not make:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.lock"), f"{folder} is being merged by"):
        if not folder.is_dir():
            print(f"verifier: merges {adapter} into {path}, in {folder}", flush=True)
            temporary = folder.with_name(f".{folder.name}.tmp")
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                _merged(base, source).save_pretrained(temporary)
                for file in small:
                    if not (temporary / file.name).exists():
                        shutil.copy2(file, temporary)
                write_json(temporary / MERGED, {"key": key, "verifier": path, "adapter": adapter})
                for file in temporary.iterdir():
                    sync(file)
                commit(temporary, folder)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                free = shutil.disk_usage(folder.parent).free / 2**30
                raise ValueError(
                    f"{folder} cannot be written ({error}; {free:.1f} GiB free): make room there"
                ) from error
    return folder


def _adapter_folder(adapter: str) -> Path:
    """Return the folder of an adapter, fetched from the hub if it is an id, which has been found to be whole."""
    folder = Path(adapter)
    if not folder.is_dir():
        problem = f"verifier.adapter {adapter!r} is neither a folder nor a reachable hub id"
        folder = fetch(adapter, None, [_CONFIG, _WEIGHTS], problem, "adapter")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"verifier.adapter must be a PEFT adapter's folder or hub id, {adapter!r} has no {name}")
    try:
        kind = json.loads((folder / _CONFIG).read_text()).get("task_type")
        with safe_open(folder / _WEIGHTS, framework="pt"):
            pass
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"verifier.adapter {adapter!r} cannot be read ({error}): fetch it again") from None
    if kind not in ("CAUSAL_LM", None):
        raise ValueError(f"verifier.adapter must be of a language model (CAUSAL_LM), {adapter!r} has task_type {kind}")
    return folder


def _small_files(base: VerifierConfig) -> list[Path]:
    """Return what a base model has besides weights, fetched from the hub if need be."""
    folder = Path(base.path)
    if not folder.is_dir():
        load_whole_config(base)  # raises if it is not there
        folder = Path(
            snapshot_download(base.path, revision=base.revision, allow_patterns=_SMALL, ignore_patterns="*/*")
        )
    found = {file for pattern in _SMALL for file in folder.glob(pattern) if not file.name.endswith(".index.json")}
    return sorted(found)


def _merged(base: VerifierConfig, adapter: Path) -> Any:
    """Load both and merge them; ValueError if that is not possible, or would give another model than PEFT runs."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("verifier.adapter needs PEFT: pip install 'fledge-eagle[adapters]'") from None
    whole = load_whole_config(base)
    if quantisation(whole) or checkpoint_file(base, "hf_quant_config.json"):
        raise ValueError(
            f"verifier.adapter cannot be merged into verifier.path {base.path!r}, whose weights are quantised: give "
            "the model that it was quantised from"
        )
    model, report = from_checkpoint(base, auto_class(whole), dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise ValueError(f"verifier.path {base.path!r} has no weights for {missing}: fetch it again")
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("error", message=message)
            return PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").merge_and_unload(safe_merge=True)
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, ImportError, UserWarning) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"verifier.adapter cannot be merged into verifier.path {base.path!r}: {reason}") from error
