"""The model card of an export: README.md as the hub reads it."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .engine_forms import forms_of
from .serving_formats import SERVING_FORMATS, ExportedHead

_HUB = "https://huggingface.co"


def license_of(card: Path | None, base_model: str | None) -> dict[str, Any]:
    """Return the licence fields of a head's card: those of its verifier's card, or that they are the verifier's."""
    with warnings.catch_warnings(action="ignore"):  # a README.md need not be a card
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card else ModelCardData()
    found = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    if "license" not in found:
        found = {"license": "other", "license_name": "the-verifiers-licence"}
        return found | ({"license_link": f"{_HUB}/{base_model}"} if base_model else {})
    link = str(found.get("license_link", ""))
    if link and "://" not in link:  # a file of the verifier's repository
        found.pop("license_link")
        found |= {"license_link": f"{_HUB}/{base_model}/blob/main/{link}"} if base_model else {}
    return found


def model_card(
    exported: ExportedHead,
    licence: dict[str, Any],
    acceptance: dict[str, Any] | None = None,
    conversations: dict[str, Any] | None = None,
    datasets: list[str] | None = None,
) -> str:
    """Return README.md.

    Args:
        licence: the card's fields.
        acceptance: acceptance.json of this head.
        conversations: the manifest of the conversations that it was trained on.
        datasets: hub ids of their prompts.
    """
    # A local folder says nothing to who reads the card elsewhere, and may say too much: its last part must do.
    verifier = exported.base_model or Path(exported.verifier).resolve().name
    data = ModelCardData(
        base_model=exported.base_model,
        datasets=datasets or None,
        eval_results=_results(acceptance) if acceptance else None,
        library_name=SERVING_FORMATS[exported.format].library,
        model_name=exported.folder if exported.on_hub else f"EAGLE-3 draft head for {verifier}",
        pipeline_tag="text-generation",
        tags=["eagle3", "speculative-decoding", "draft-head"],
        **licence,
    )
    head, start, source = exported.head, exported.started_from, exported.imported_from
    origin = f"Converted with fledge from `{source}`" if source else "Trained with fledge"
    origin += f", from `{start}` on" if start else ""
    terms = "The head was made from its verifier's output and weights: the verifier's licence applies"
    norms = (f"`{name}` {'yes' if getattr(head, name) else 'no'}" for name in ("fc_norm", "norm_output"))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# EAGLE-3 draft head for {verifier}",
        f"A draft head guesses the next tokens of its verifier, `{verifier}`{exported.at_revision}, which checks them "
        "all in one forward pass and keeps those it would have written itself: the output stays the verifier's. "
        f"{origin}; [SERVING.md](SERVING.md) has the commands.",
        f"- format: {exported.format}, {exported.dtype}\n"
        f"- reads the outputs of the verifier's layers {', '.join(map(str, head.aux_layers))} (0-based)\n"
        f"- draft vocabulary: {head.draft_vocab_size:,} of the verifier's {head.vocab_size:,} tokens\n"
        f"- EAGLE-3.1 norms: {', '.join(norms)}"
        + "".join(f"\n- {form}" for form in forms_of(exported) if "EAGLE-3.1" not in form),
        *([_acceptance(acceptance)] if acceptance else []),
        *([_sources(conversations)] if conversations else []),
        f"## License\n\n{terms}{', and that of the head it was made from' if source or start else ''}.",
    ]
    return "\n\n".join(parts) + "\n"


def _by_category(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: drafters["trained head"] for name, drafters in results["by_category"].items()}


def _results(results: dict[str, Any]) -> list[EvalResult]:
    """Return the acceptance lengths as the hub lists results: of all questions, and of each category."""
    questions = str(results["questions"])
    dataset = Path(questions).name if Path(questions).exists() or questions.startswith(("/", ".")) else questions
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"{Path(dataset).name}{f' ({category})' if category else ''}",
            dataset_config=category,
            metric_type="acceptance_length",
            metric_name=f"acceptance length, {results['num_draft_tokens_per_round']} draft tokens",
            metric_value=round(counts["acceptance_length"], 3),
        )
        for category, counts in ((None, results), *_by_category(results).items())
    ]


def _acceptance(results: dict[str, Any]) -> str:
    positions = [f"position {i + 1}" for i in range(len(results["acceptance_rate_per_pos"]))]
    cells = [["category", "acceptance length", *positions]]
    for name, counts in (("all", results), *_by_category(results).items()):
        numbers = (counts["acceptance_length"], *counts["acceptance_rate_per_pos"])
        cells.append([name, *(f"{number:.2f}" for number in numbers)])
    header, *lines = (f"| {' | '.join(row)} |" for row in cells)
    conditions = (
        f"{results['num_questions']} questions (`{Path(str(results['questions'])).name}`), "
        f"{results['num_draft_tokens_per_round']} draft tokens a round, {results['drafting']} drafting, temperature "
        f"{results['temperature']:g}, {results['dtype'] or results['engine']}, at most {results['max_tokens']} tokens "
        f"an answer; {results['definition']}. Positions: rounds that accepted the token, of all rounds."
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
