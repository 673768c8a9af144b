"""The import command: a head made elsewhere becomes a checkpoint that evaluate and export take."""

from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import artifact, file_digest
from ..conf.schema import Config, HeadImportConfig
from .formats.plain import CONFIG, EMBEDDING, RECORD, WEIGHTS, dtype_name, longest_sample, save_head
from .formats.published import read_published_head, weight_files
from .formats.training_folder import head_origin
from .hub import fetch_head
from .verifier.config import load_config
from .verifier.weights import VerifierWeights, verifier_identity


def import_head(config: Config) -> None:
    """Write runs/<name>/imports/<source's name>/ from the head at head_import.source."""
    options, source = config.head_import, source_folder(config.head_import)
    folder = import_folder(config.run_folder, str(options.source))
    revision = f"@{options.revision}" if options.revision else ""
    origin = head_origin(source) if Path(str(options.source)).is_dir() else f"{options.source}{revision}"
    if folder.resolve() == source:
        raise ValueError(f"head_import.source {options.source!r} was imported already: give the head as published")
    files = weight_files(source)
    settings: dict[str, Any] = {
        "source": {path.name: file_digest(path) for path in (source / CONFIG, *files)},
        "aux_numbering": options.aux_numbering.value if options.aux_numbering else None,
        "verifier": verifier_identity(config.verifier),
    }
    settings |= {"aux_layers": options.aux_layers} if options.aux_layers else {}
    settings |= {"interleaved_rotary": True} if options.interleaved_rotary else {}
    weights = VerifierWeights(config.verifier)
    published = read_published_head(source, load_config(config.verifier), options, weights)
    with artifact(folder, "import", settings, config.overwrite) as target:
        if target.complete and all((folder / name).is_file() for name in (CONFIG, WEIGHTS, RECORD)):
            print(f"import: {folder} is complete")
            return
        record = {"verifier": settings["verifier"], "step": 0, "imported_from": origin}
        record |= {"longest_sample": longest} if (longest := longest_sample(source)) else {}
        save_head(folder, published.head, record, published.dtype)
        target.finish()
    head = published.head.config
    if head.own_embedding and head.hidden_size == head.verifier_hidden_size:
        print(
            f"import: {EMBEDDING} differs from the embedding of verifier.path={config.verifier.path} and is kept; "
            "SGLang and TensorRT-LLM would serve the verifier's. If the head was made for another one, set that"
        )
    print(
        f"import: {folder}, {dtype_name(published.dtype)}, aux layers {list(head.aux_layers)} (0-based), draft "
        f"vocabulary {head.draft_vocab_size}; use it with evaluate.checkpoint={folder} or export.checkpoint={folder}"
    )


def import_folder(run_folder: Path, source: str) -> Path:
    """Return the folder of a run that a head, by its folder or hub id, is read into."""
    return run_folder / "imports" / Path(source).resolve().name


def source_folder(options: HeadImportConfig) -> Path:
    """Return the folder of the published head, fetched from the hub if need be; ValueError: there is none."""
    if options.source is None:
        raise ValueError(
            "head_import.source is required: give the folder of a head (config.json and weights) or its hub id"
        )
    folder = Path(options.source).resolve()
    return folder if folder.is_dir() else fetch_head(options.source, options.revision)
