"""The Hugging Face hub: heads come from it, exports go to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..conf.runtime.artifact import MANIFEST
from .formats.plain import CONFIG
from .formats.published import INDEX, PICKLE

_OF_A_HEAD = [CONFIG, "*.safetensors", INDEX, PICKLE]


def fetch_head(hub_id: str, revision: str | None) -> Path:
    """Return the folder of a head on the hub, downloaded or from the cache; ValueError: it cannot be had."""
    problem = f"head_import.source {hub_id!r} is neither a folder nor a head on the hub that can be had"
    return fetch(hub_id, revision, _OF_A_HEAD, problem, "head")


def fetch(hub_id: str, revision: str | None, files: list[str], problem: str, what: str) -> Path:
    """Return the folder with these files of a repository, downloaded or from the cache.

    ValueError: they cannot be had; `problem` says so, `what` is their name in its cure.
    """
    cure = (
        f"give a folder or ORG/NAME; for a private or gated {what} set HF_TOKEN, and without network fetch it before "
        f"by `hf download {hub_id}`"
    )
    with _explained(problem, cure):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))


def push(folder: Path, hub_id: str, private: bool) -> str:
    """Upload an export, and return its address there; what the hub has already is not sent again."""
    cure = (
        f"log in with `hf auth login` or set HF_TOKEN to a token that may write there; the export is in {folder}, the "
        "same command uploads it"
    )
    with _explained(f"export.push_to {hub_id!r} cannot be written", cure):
        api = HfApi()
        address = api.create_repo(hub_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            ignore_patterns=[MANIFEST],
            commit_message="Upload a draft head with fledge",
        )
        return str(address)


@contextmanager
def _explained(problem: str, cure: str) -> Iterator[None]:
    """Turn what the client of the hub raises into one sentence."""
    try:
        yield
    except Exception as error:  # its library of HTTP, and so the type of a lost connection, differs by release
        raise ValueError(f"{problem} ({' '.join(str(error).split())[:200]}): {cure}") from None
