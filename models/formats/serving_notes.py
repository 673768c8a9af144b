"""The texts beside an export's weights: how to serve it (SERVING.md, trtllm.yaml) and its model card (README.md)."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..head.config import DraftHeadConfig


@dataclass
class Served:
    """A head and the verifier it serves with."""

    head: DraftHeadConfig
    folder: str  # of the export, as the commands name it
    format: str
    dtype: str
    verifier: str  # folder or hub id
    verifier_layers: int
    revision: str | None
    num_draft_tokens: int
    imported_from: str | None = None  # the published head it was made of, None if fledge trained it


def unserved(served: Served) -> dict[str, str]:
    """Give the engines that read an export's format and cannot serve the head as it was trained, and why."""
    head = served.head
    if served.format == "speculators":
        fc = f"releases up to 0.33 build fc for 3 aux layers in this format, and it has {len(head.aux_layers)}"
        return {} if len(head.aux_layers) == 3 else {"vLLM": f"{fc}: set export.format=plain"}
    reasons: dict[str, list[str]] = {"SGLang": [], "TensorRT-LLM": []}
    for found in reasons.values():
        if head.own_embedding and head.hidden_size == head.verifier_hidden_size:
            found.append("it takes the verifier's embedding in place of the head's own")
        if head.norm_before_residual:
            found.append("it ignores norm_before_residual")
    if served.verifier_layers - 1 in head.aux_layers:
        reasons["SGLang"].append("it cannot take the output of the verifier's last layer")
    return {engine: " and ".join(found) for engine, found in reasons.items() if found}


def vllm_command(served: Served) -> str:
    """Give the command that serves the verifier with the head in vLLM."""
    options = {"method": "eagle3", "model": served.folder, "num_speculative_tokens": served.num_draft_tokens}
    revision = f" --revision {shlex.quote(served.revision)}" if served.revision else ""
    return (
        f"vllm serve {shlex.quote(served.verifier)}{revision} --speculative-config {shlex.quote(json.dumps(options))}"
    )


def serving_notes(served: Served) -> str:
    """Give SERVING.md: a command for each engine that reads the format."""
    parts = [f"# Serving this head\n\nThe verifier is `{served.verifier}`{_revision(served)}."]
    refused = unserved(served)
    sections = {"vLLM": _vllm(served)}
    if served.format == "plain":
        sections |= {"SGLang": _sglang(served), "TensorRT-LLM": _tensorrt_llm(served)}
    for engine, section in sections.items():
        reason = refused.get(engine)
        parts.append(section if reason is None else f"## {engine}\n\n{engine} cannot serve this head: {reason}.")
    if served.head.fc_norm or served.head.norm_output:
        parts.append(
            "The head is of the EAGLE-3.1 form (`fc_norm`, `norm_output`): releases that do not know these two fields "
            "either refuse it or accept fewer tokens than they should."
        )
    return "\n\n".join(parts) + "\n"


def _revision(served: Served) -> str:
    return f" at revision `{served.revision}`" if served.revision else ""


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _vllm(served: Served) -> str:
    alone = f"\n\nor, as the checkpoint names its verifier:\n\n{_code('vllm serve ' + shlex.quote(served.folder))}"
    return f"## vLLM\n\n{_code(vllm_command(served))}" + (
        alone if served.format == "speculators" and not served.revision else ""
    )


def _sglang(served: Served) -> str:
    revision = [f"--revision {shlex.quote(served.revision)}"] if served.revision else []
    lines = [
        f"python -m sglang.launch_server --model-path {shlex.quote(served.verifier)}",
        *revision,
        "--speculative-algorithm EAGLE3",
        f"--speculative-draft-model-path {shlex.quote(served.folder)}",
        f"--speculative-num-steps {served.num_draft_tokens}",
        "--speculative-eagle-topk 1",
        f"--speculative-num-draft-tokens {served.num_draft_tokens + 1}",
    ]
    note = "Beside an explicit `--quantization`, add `--speculative-draft-model-quantization unquant`."
    return f"## SGLang\n\n{_code(' '.join(lines))}\n\n{note}"


def _tensorrt_llm(served: Served) -> str:
    options = shlex.quote(f"{served.folder}/trtllm.yaml")
    command = f"trtllm-serve {shlex.quote(served.verifier)} --extra_llm_api_options {options}"
    note = (
        "TensorRT-LLM does not read the aux layers of the checkpoint, they stand in `trtllm.yaml`. Older releases want "
        "`decoding_type: Eagle` and `pytorch_eagle_weights_path` in it for `Eagle3` and `speculative_model`."
    )
    return f"## TensorRT-LLM\n\n{_code(command)}\n\n{note}"


def trtllm_options(served: Served) -> str:
    """Give trtllm.yaml; TensorRT-LLM numbers layers as fledge does, 0-based, their outputs taken."""
    return (
        "speculative_config:\n"
        "  decoding_type: Eagle3\n"
        f"  max_draft_len: {served.num_draft_tokens}\n"
        f"  speculative_model: {json.dumps(served.folder)}\n"
        f"  eagle3_layers_to_capture: {list(served.head.aux_layers)}\n"
    )


def model_card(served: Served, acceptance: dict[str, Any] | None, conversations: dict[str, Any] | None) -> str:
    """Give README.md in Hugging Face's form.

    Args:
        acceptance: acceptance.json of this head, if it was evaluated.
        conversations: the manifest of the conversations it was trained on, if known.
    """
    # A local folder says nothing to who reads the card elsewhere, and may say too much: its last part must do.
    verifier = Path(served.verifier).resolve().name if Path(served.verifier).exists() else served.verifier
    front = {
        "base_model": verifier,
        "library_name": "speculators" if served.format == "speculators" else "fledge",
        "tags": ["eagle3", "speculative-decoding", "draft-head"],
        "license": "other",
    }
    head = served.head
    foreign = served.imported_from
    origin = f"Converted with fledge from `{foreign}`" if foreign else "Trained with fledge"
    licence = "The head was made from its verifier's output and weights: the verifier's licence applies"
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# EAGLE-3 draft head for {verifier}",
        f"A draft head guesses the next tokens of its verifier, `{verifier}`{_revision(served)}, which checks them all "
        "in one forward pass and keeps those it would have written itself: the output stays the verifier's. "
        f"{origin}; [SERVING.md](SERVING.md) has the commands.",
        f"- format: {served.format}, {served.dtype}\n"
        f"- reads the outputs of the verifier's layers {', '.join(map(str, head.aux_layers))} (0-based)\n"
        f"- draft vocabulary: {head.draft_vocab_size:,} of the verifier's {head.vocab_size:,} tokens\n"
        f"- EAGLE-3.1 norms: `fc_norm` {_yes(head.fc_norm)}, `norm_output` {_yes(head.norm_output)}",
        *([_acceptance(acceptance)] if acceptance else []),
        *([_sources(conversations)] if conversations else []),
        f"## License\n\n{licence}{', and that of the head it was converted from' if foreign else ''}.",
    ]
    return "\n\n".join(parts) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _acceptance(results: dict[str, Any]) -> str:
    rows = [("all", results), *((name, drafters["trained head"]) for name, drafters in results["by_category"].items())]
    positions = range(len(results["acceptance_rate_per_pos"]))
    lines = [
        "| category | acceptance length | " + " | ".join(f"position {i + 1}" for i in positions) + " |",
        "|---" * (2 + len(positions)) + "|",
        *(
            f"| {name} | {counts['acceptance_length']:.2f} | "
            + " | ".join(f"{rate:.2f}" for rate in counts["acceptance_rate_per_pos"])
            + " |"
            for name, counts in rows
        ),
    ]
    conditions = (
        f"{results['num_questions']} questions (`{Path(str(results['questions'])).name}`), "
        f"{results['num_draft_tokens_per_round']} draft tokens a round, {results['drafting']} drafting, temperature "
        f"{results['temperature']:g}, {results['dtype']}, at most {results['max_tokens']} tokens an answer; "
        f"{results['definition']}. Positions: rounds that accepted the token, of all rounds."
    )
    return "## Acceptance\n\n" + conditions + "\n\n" + "\n".join(lines)


def _sources(manifest: dict[str, Any]) -> str:
    options = manifest["settings"]["synthesize"]
    lines = [f"- {name}: {number:,} conversations" for name, number in manifest.get("sources", {}).items()]
    text = (
        f"The verifier answered {manifest['counts']['conversations']:,} conversations itself, at temperature "
        f"{options['temperature']:g} (held-out ones, a share of {manifest['settings']['heldout_share']:g}, greedily)."
    )
    return "## Training data\n\n" + text + ("\n\n" + "\n".join(lines) if lines else "")
