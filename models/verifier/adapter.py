"""A verifier with a PEFT adapter (`verifier.adapter`), merged once into a folder that all stages and engines load."""

import shutil
import warnings
from functools import cache
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download

from ...conf.runtime.artifact import commit, digest, file_digest
from ...conf.schema import VerifierConfig
from .config import auto_class, from_checkpoint, load_whole_config
from .quantised import quantisation
from .weights import VerifierWeights

_FILES = ["adapter_config.json", "adapter_model.safetensors"]
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # tokenizer, templates, processors


@cache
def merged_folder(path: str, revision: str | None, adapter: str) -> Path:
    """Return the folder of a verifier with the adapter merged into it; it is made at first use.

    It lies in the hub's cache (HF_HOME), under a name that the verifier's and the adapter's content decide. Weights
    have the type of the verifier's checkpoint; tokenizer and chat template are the verifier's.

    Args:
        path: the base model, a folder or hub id.
        revision: of it on the hub.
        adapter: folder or hub id of the adapter.

    Raises:
        ValueError: PEFT is not installed, either is not there, or they cannot be merged.
    """
    base, files = VerifierConfig(path, revision), [_adapter(adapter) / name for name in _FILES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"verifier.adapter must be a PEFT adapter's folder or hub id, {adapter!r} has no {missing[0]}")
    if quantisation(load_whole_config(base)):
        raise ValueError(
            f"verifier.adapter cannot be merged into verifier.path {path!r}, whose weights are quantised: give the "
            "model that it was quantised from"
        )
    content = [VerifierWeights(base).fingerprint(), *map(file_digest, files)]
    folder = Path(constants.HF_HOME) / "fledge" / f"merged-{digest(content)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"verifier: merges {adapter} into {path}, in {folder}", flush=True)
            _merge(base, adapter, folder)
    return folder


def _adapter(adapter: str) -> Path:
    """Return the folder of an adapter, fetched from the hub if it is an id."""
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"verifier.adapter {adapter!r} is neither a folder nor a reachable hub id: {reason}") from None


def _merge(base: VerifierConfig, adapter: str, folder: Path) -> None:
    """Write the merged model, and what the base has besides weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("verifier.adapter needs PEFT: pip install 'fledge-eagle[adapters]'") from None
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = from_checkpoint(base, auto_class(load_whole_config(base)), dtype="auto")
    try:
        with warnings.catch_warnings():  # an adapter of other modules would change nothing, with a warning alone
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(model, str(_adapter(adapter))).merge_and_unload(safe_merge=True)
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"verifier.adapter {adapter!r} cannot be merged into {base.path!r}: {reason}") from error
    merged.save_pretrained(temporary)
    source = Path(base.path)
    if not source.is_dir():
        source = Path(snapshot_download(base.path, revision=base.revision, allow_patterns=_SMALL))
    for pattern in _SMALL:
        for file in source.glob(pattern):
            if not (temporary / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copy2(file, temporary)
    commit(temporary, folder)
