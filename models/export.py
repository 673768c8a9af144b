"""The export stage: checkpoints that serving engines load as they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..conf.runtime.artifact import MANIFEST, commit, digest, held, write_atomic, write_json
from ..conf.schema import Config, ExportFormat
from .formats.engine_forms import VLLM
from .formats.model_card import license_of, model_card
from .formats.plain import WEIGHTS, head_digest, load_head
from .formats.serving_formats import SERVING_FORMATS, ExportedHead, vllm_command
from .formats.serving_notes import engines_of, serving_files, unserved
from .formats.training_folder import head_folder
from .head.draft_head import DraftHead
from .hub import push
from .verifier.config import checkpoint_file, load_whole_config, verifier_location
from .verifier.weights import VerifierWeights, check_identity


def export(config: Config) -> None:
    """Write runs/<name>/exports/<format>/ from a head, in one format or all, and upload it if asked to.

    A half-written export is never seen.
    """
    base_model = _base_model(config)
    source = head_folder(config.export.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_identity(record["verifier"], config.verifier, str(source), "set the verifier it was trained for")
    if window := config.export.sliding_window:
        head.config = replace(head.config, sliding_window=window, window_layers=tuple(range(head.config.num_layers)))
    if not config.export.lm_head:
        _check_lm_head(config, head, source)
    choice = config.export.format
    formats = SERVING_FORMATS if choice is ExportFormat.all else [choice.value]
    exports = [_exported(config, format_, head, record, base_model) for format_ in formats]
    for exported in _served(exports, source):
        _export_one(config, exported, source, head, record)


def _served(exports: list[ExportedHead], source: Path) -> list[ExportedHead]:
    """Return the exports that an engine serves as trained, and print why others are left out; ValueError: none is."""
    found = []
    for exported in exports:
        refused = unserved(exported)
        if engines_of(exported) - refused.keys():
            found.append(exported)
            continue
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in refused.items())
        problem = f"export.format={exported.format} is read by no engine that serves {source} as trained: {reasons}"
        if len(exports) == 1:
            raise ValueError(f"{problem}. Train a head of another form (draft)")
        print(f"export: {problem}. It is left out")
    if not found:
        raise ValueError(
            f"{source} is served as trained by no engine, in no format: train a head of another form (draft)"
        )
    return found


def _check_lm_head(config: Config, head: DraftHead, source: Path) -> None:
    """Raise ValueError if the head's lm_head is not, row by row, the one that the verifier's file holds."""
    if (
        head.config.draft_vocab_size < head.config.vocab_size
        or head.config.hidden_size != head.config.verifier_hidden_size
    ):
        differs = f"{head.config.draft_vocab_size} rows of {head.config.hidden_size}"
    else:
        dtype, theirs = getattr(torch, config.export.dtype.value), VerifierWeights(config.verifier).lm_head()
        rows = (head.lm_head.weight.to(dtype) != theirs.to(dtype)).any(dim=1)
        differs = f"{int(rows.sum())} rows that differ" if rows.any() else ""
    if differs:
        raise ValueError(
            f"export.lm_head=false leaves the head to its verifier's lm_head, and that of {source} has {differs}: set "
            "export.lm_head=true, or train with draft.vocab_size=null draft.train_lm_head=false"
        )


def _base_model(config: Config) -> str | None:
    """Return the verifier's hub id; None if it has none. ValueError: an export for the hub needs one."""
    location = verifier_location(config.verifier)
    base_model = config.export.base_model or (None if Path(location).exists() else location)
    if config.export.push_to and base_model is None:
        raise ValueError(
            f"export.base_model is required with export.push_to and the verifier {location}, a folder here: give its "
            "hub id" + (", once the merged model is there" if config.verifier.adapter else "")
        )
    return base_model


def _exported(
    config: Config, format_: str, head: DraftHead, record: dict[str, Any], base_model: str | None
) -> ExportedHead:
    options = config.export
    return ExportedHead(
        head=head.config,
        lm_head=options.lm_head,
        folder=options.push_to or str(config.run_folder / "exports" / format_),
        format=format_,
        dtype=options.dtype.value,
        verifier=base_model or verifier_location(config.verifier),
        architectures=list(load_whole_config(config.verifier).architectures or []),
        verifier_layers=record["verifier"]["num_layers"],
        revision=None if config.verifier.adapter else config.verifier.revision,
        num_draft_tokens=config.evaluate.draft_depth,  # a chain as deep as the tree that was evaluated
        imported_from=record.get("imported_from"),
        started_from=record.get("started_from"),
        base_model=base_model,
        on_hub=options.push_to is not None,
        longest_sample=record.get("longest_sample"),
    )


def _export_one(config: Config, exported: ExportedHead, source: Path, head: DraftHead, record: dict[str, Any]) -> None:
    options, folder = config.export, config.run_folder / "exports" / exported.format
    texts = {**serving_files(exported), "README.md": _card(config, source, exported)}
    settings: dict[str, Any] = {"head": head_digest(source), "dtype": exported.dtype}
    settings |= {"format": exported.format, "num_draft_tokens": exported.num_draft_tokens, "texts": digest(texts)}
    settings |= {} if exported.lm_head else {"lm_head": False}
    settings |= {"sliding_window": options.sliding_window} if options.sliding_window else {}
    if _write(folder, exported, head, record, texts, settings):
        refused = unserved(exported)
        for engine, reason in refused.items():
            print(f"export: {engine} cannot serve this head: {reason}")
        in_vllm = VLLM in engines_of(exported) - refused.keys()
        command = f", served by `{vllm_command(exported)}`" if in_vllm else ""
        print(f"export: {folder}{command}; more in {folder / 'SERVING.md'}")
    if options.push_to:
        print(f"export: uploaded to {push(folder, options.push_to, options.private)}")


def _write(
    folder: Path,
    exported: ExportedHead,
    head: DraftHead,
    record: dict[str, Any],
    texts: dict[str, str],
    settings: dict[str, Any],
) -> bool:
    """Write an export; return whether it was not there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.lock"), f"{folder} is being written by"):
        manifest = _manifest(folder)
        if folder.exists() and manifest.get("kind") != "export":
            raise ValueError(f"{folder} is not an export of fledge's: move it away")
        if manifest.get("settings") == settings and all((folder / name).is_file() for name in (WEIGHTS, *texts)):
            print(f"export: {folder} is complete")
            return False
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        SERVING_FORMATS[exported.format].write(temporary, head, record, exported)
        for name, text in texts.items():
            write_atomic(temporary / name, text)
        write_json(temporary / MANIFEST, {"kind": "export", "settings": settings, "complete": True})
        shutil.rmtree(folder, ignore_errors=True)
        commit(temporary, folder)
    return True


def _card(config: Config, source: Path, exported: ExportedHead) -> str:
    """Return the model card, with what the run measured of this very head and trained it on."""
    trained_here = (config.training_folder / "checkpoints").resolve() in source.resolve().parents
    conversations = _manifest(config.conversations_folder) if trained_here else {}
    prompts = _manifest(config.prompts_folder) if trained_here else {}
    sources = prompts["settings"]["sources"].values() if prompts else []
    datasets = sorted({source["path"] for source in sources if "path" in source})  # the others have no hub id
    licence = license_of(checkpoint_file(config.verifier, "README.md"), exported.base_model)
    return model_card(exported, licence, _acceptance(config, source), conversations or None, datasets)


def _acceptance(config: Config, source: Path) -> dict[str, Any] | None:
    """Return acceptance.json of the run if it was measured with this very head, by its digest and window."""
    path = config.run_folder / "evaluation" / "acceptance.json"
    measured = (_manifest(path.parent).get("settings") or {}).get("head")
    this = path.is_file() and measured == head_digest(source) and not config.export.sliding_window
    return json.loads(path.read_text()) if this else None


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that is complete; else nothing."""
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    return manifest if manifest.get("complete") else {}
