"""Folders that stages hand to each other: manifests, atomic files, locks, and the rule for making one anew."""

import hashlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ... import __version__
from .signals import listening

MANIFEST = "manifest.json"
_HOLDER = "-holder"  # after the name of a lock: the file that says who holds it
_OF_LOCK = (".lock", f".lock{_HOLDER}")
# Commands that make an artifact, if they are not named like it.
_COMMANDS = {"hidden_states": "dump", "training": "train", "evaluation": "evaluate"}
_COMMANDS |= dict.fromkeys(("self_prompts", "prompts", "conversations"), "synthesize")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    commit(temporary, path)


def commit(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name and make the rename durable."""
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync(path: Path) -> None:
    """Make a file's content durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest(value: Any) -> str:
    """Hash a JSON-able value, independent of the order of keys (16 hex digits of SHA-256)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def seed_of(*content: Any) -> int:
    """Return a seed, below 2^63, that follows from JSON-like contents."""
    return int(digest(list(content)), 16) % 2**63


def file_digest(path: Path) -> str:
    """Hash the content of a file (SHA-256, hex)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, kind: str, unfinished: bool = False) -> dict[str, Any]:
    """Read the manifest of an artifact that is complete, or may be `unfinished`; ValueError if there is none."""
    path, command = folder / MANIFEST, f"fledge {_COMMANDS.get(kind, kind)}"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {kind} ({MANIFEST} is missing): run `{command}` first")
    manifest = _load_manifest(path)
    if manifest.get("kind") != kind:
        raise ValueError(f"{folder} holds {manifest.get('kind')}, {kind} is required")
    if manifest.get("settings", {}) is None:
        raise ValueError(f"{folder} is being cleared, or that was killed: run `{command}` again")
    if not manifest.get("complete") and not unfinished:
        raise ValueError(f"{folder} is not complete: run `{command}` again, it goes on where it stopped")
    return manifest


def _load_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): delete the folder and make it again") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a manifest: delete the folder and make it again")
    return manifest


@dataclass
class Artifact:
    """A folder being made: its manifest, and whether there is anything left to do."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the artifact was finished with the same settings."""
        return bool(self.manifest["complete"])

    def save(self, **fields: Any) -> None:
        """Update fields of the manifest on disk."""
        self.manifest.update(fields)
        write_json(self.folder / MANIFEST, self.manifest)

    def finish(self, **fields: Any) -> None:
        """Mark the artifact complete; `digest` then names its content to the stages that follow."""
        self.manifest.update(fields)
        content = {key: value for key, value in self.manifest.items() if key not in ("complete", "digest")}
        self.save(complete=True, digest=digest(content))


def find_artifact(folder: Path, settings: dict[str, Any]) -> Artifact | None:
    """Return the artifact in a folder, for reading, if it was begun or finished with these settings."""
    path = folder / MANIFEST
    manifest = _load_manifest(path) if path.is_file() else {}
    return Artifact(folder, manifest) if manifest.get("settings") == json.loads(json.dumps(settings)) else None


@contextmanager
def artifact(
    folder: Path, kind: str, settings: dict[str, Any], overwrite: bool = False, wait: bool = False
) -> Iterator[Artifact]:
    """Open an artifact folder for writing, alone; what an earlier start with the same settings left is kept.

    `settings` are all that determines the content, JSON-able, inputs' digests included. ValueError if it was made with
    others (unless `overwrite`: it is deleted), another process writes it (unless `wait`), or it is no artifact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cure = None if wait else "wait for it or choose another name"
    with held(folder / ".lock", f"{folder} is being written by", cure):
        yield _open(folder, kind, json.loads(json.dumps(settings)), overwrite)


@contextmanager
def held(path: Path, what: str, cure: str | None = None) -> Iterator[None]:
    """Hold a lock, alone. A file next to it says who does, and whether that process is asked to stop.

    If another process holds it, raise ValueError, `what` before and `cure` after its name; without a cure, wait.
    """
    lock, about = FileLock(path, timeout=0), path.with_name(path.name + _HOLDER)
    try:
        lock.acquire()
    except Timeout:
        what += " another process"
        with suppress(OSError):  # it has just ended
            what += f" ({about.read_text()})"
        if cure:
            raise ValueError(f"{what}: {cure}") from None
        print(f"{what}: waiting for it", flush=True)
        lock.acquire(timeout=-1)

    def note(came: signal.Signals) -> None:
        with suppress(OSError), open(about, "r+") as file:  # never made anew
            file.seek(0, os.SEEK_END)
            file.write(f", asked to stop by {came.name} at {time.strftime('%X')}, ends soon")

    try:
        with suppress(OSError):  # the disk may be full
            about.write_text(f"{os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %X')}")
        with listening(note):
            yield
    finally:
        with suppress(OSError):
            os.remove(about)
        lock.release()


def _open(folder: Path, kind: str, settings: dict[str, Any], overwrite: bool) -> Artifact:
    path = folder / MANIFEST
    if path.is_file():
        manifest = _load_manifest(path)
        if manifest.get("kind") != kind:
            raise ValueError(f"{folder} holds {manifest.get('kind')}, {kind} cannot be written there")
        if manifest["settings"] == settings:
            return Artifact(folder, manifest)
        if not overwrite and manifest["settings"] is not None:  # None: an earlier start was clearing it
            changes = "; ".join(differences(manifest["settings"], settings))
            cure = "choose another name, or overwrite=true to make it anew"
            raise ValueError(f"{folder} was made with other settings ({changes}): {cure}")
        _clear(folder)
    elif any(entry.name not in (*_OF_LOCK, f".{MANIFEST}.tmp") for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {MANIFEST}: it is not fledge's to write, choose another folder")
    fresh = Artifact(folder, {"kind": kind, "fledge": __version__, "settings": settings, "complete": False})
    fresh.save()
    return fresh


def _clear(folder: Path) -> None:
    """Delete what a folder holds. A kill in between leaves a manifest without settings: the next start clears on."""
    for inner in folder.glob("*/.lock"):
        with held(inner, f"{inner.parent} is being written by", "stop it, or wait for it"):
            pass
    write_json(folder / MANIFEST, {**_load_manifest(folder / MANIFEST), "settings": None, "complete": False})
    for entry in [entry for entry in folder.iterdir() if entry.name not in (*_OF_LOCK, MANIFEST)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / MANIFEST).unlink()


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Name the entries in which two nested settings differ, as `dotted.name: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name}: {old} -> {new}"]
