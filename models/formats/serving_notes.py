"""The texts next to an export's weights: how to serve it (SERVING.md) and its model card (README.md)."""

import json
from pathlib import Path
from typing import Any

from .serving_formats import SERVING_FORMATS, ExportedHead


def unserved(exported: ExportedHead) -> dict[str, str]:
    """Return the engines that read an export's format and cannot serve the head as it was trained, and why."""
    obstacles = {engine.name: engine.obstacles(exported) for engine in SERVING_FORMATS[exported.format].engines}
    return {engine: " and ".join(found) for engine, found in obstacles.items() if found}


def serving_files(exported: ExportedHead) -> dict[str, str]:
    """Return SERVING.md, with a command for each engine that reads the format, and the files that they need."""
    engines, refused = SERVING_FORMATS[exported.format].engines, unserved(exported)
    parts = [
        f"# Serving this head\n\nThe verifier is `{exported.verifier}`{_revision(exported)}.",
        *(
            f"## {engine.name}\n\n{engine.name} cannot serve this head: {refused[engine.name]}."
            if engine.name in refused
            else engine.section(exported)
            for engine in engines
        ),
    ]
    if exported.head.fc_norm or exported.head.norm_output:
        parts.append(
            "The head is of the EAGLE-3.1 form (`fc_norm`, `norm_output`): releases that do not know these two fields "
            "either refuse it or accept fewer tokens than they should."
        )
    files = [engine.files(exported) for engine in engines if engine.name not in refused]
    return {"SERVING.md": "\n\n".join(parts) + "\n", **{name: text for some in files for name, text in some.items()}}


def _revision(exported: ExportedHead) -> str:
    return f" at revision `{exported.revision}`" if exported.revision else ""


def model_card(exported: ExportedHead, acceptance: dict[str, Any] | None, conversations: dict[str, Any] | None) -> str:
    """Return README.md in Hugging Face's form, with this head's acceptance.json and its conversations' manifest."""
    # A local folder says nothing to who reads the card elsewhere, and may say too much: its last part must do.
    verifier = Path(exported.verifier).resolve().name if Path(exported.verifier).exists() else exported.verifier
    front = {
        "base_model": verifier,
        "library_name": SERVING_FORMATS[exported.format].library,
        "tags": ["eagle3", "speculative-decoding", "draft-head"],
        "license": "other",
    }
    head, source = exported.head, exported.imported_from
    origin = f"Converted with fledge from `{source}`" if source else "Trained with fledge"
    licence = "The head was made from its verifier's output and weights: the verifier's licence applies"
    norms = (f"`{name}` {'yes' if getattr(head, name) else 'no'}" for name in ("fc_norm", "norm_output"))
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# EAGLE-3 draft head for {verifier}",
        f"A draft head guesses the next tokens of its verifier, `{verifier}`{_revision(exported)}, which checks them "
        "all in one forward pass and keeps those it would have written itself: the output stays the verifier's. "
        f"{origin}; [SERVING.md](SERVING.md) has the commands.",
        f"- format: {exported.format}, {exported.dtype}\n"
        f"- reads the outputs of the verifier's layers {', '.join(map(str, head.aux_layers))} (0-based)\n"
        f"- draft vocabulary: {head.draft_vocab_size:,} of the verifier's {head.vocab_size:,} tokens\n"
        f"- EAGLE-3.1 norms: {', '.join(norms)}",
        *([_acceptance(acceptance)] if acceptance else []),
        *([_sources(conversations)] if conversations else []),
        f"## License\n\n{licence}{', and that of the head it was converted from' if source else ''}.",
    ]
    return "\n\n".join(parts) + "\n"


def _acceptance(results: dict[str, Any]) -> str:
    rows = [("all", results), *((name, drafters["trained head"]) for name, drafters in results["by_category"].items())]
    positions = [f"position {i + 1}" for i in range(len(results["acceptance_rate_per_pos"]))]
    cells = [["category", "acceptance length", *positions]]
    for name, counts in rows:
        numbers = (counts["acceptance_length"], *counts["acceptance_rate_per_pos"])
        cells.append([name, *(f"{number:.2f}" for number in numbers)])
    header, *lines = (f"| {' | '.join(row)} |" for row in cells)
    conditions = (
        f"{results['num_questions']} questions (`{Path(str(results['questions'])).name}`), "
        f"{results['num_draft_tokens_per_round']} draft tokens a round, {results['drafting']} drafting, temperature "
        f"{results['temperature']:g}, {results['dtype']}, at most {results['max_tokens']} tokens an answer; "
        f"{results['definition']}. Positions: rounds that accepted the token, of all rounds."
    )
    return "\n".join(["## Acceptance\n", conditions + "\n", header, "|---" * len(cells[0]) + "|", *lines])


def _sources(manifest: dict[str, Any]) -> str:
    options = manifest["settings"]["synthesize"]
    text = (
        f"The verifier answered {manifest['counts']['conversations']:,} conversations itself, at temperature "
        f"{options['temperature']:g} (held-out ones, a share of {manifest['settings']['heldout_share']:g}, greedily)."
    )
    lines = [f"- {name}: {number:,} conversations" for name, number in manifest.get("sources", {}).items()]
    return "\n\n".join(["## Training data", text, *(["\n".join(lines)] if lines else [])])
