"""What an evaluation found: acceptance.json, made of the records of its questions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import digest
from ...conf.runtime.journal import read_journal
from ...conf.schema import Config, DraftSampling, EvaluateConfig, EvaluateEngine
from ...data_synthesis.heldout import conversation_id
from ...models.formats.plain import HELDOUT_WALKS
from ..questions import Question
from .metrics import acceptance_interval, count, macro_acceptance_length, speedup_interval
from .records import HELDOUT, RECORDS, TRAINED, Record

DEFINITION = "acceptance_length = 1 + num_accepted_tokens / num_drafts, bonus token included, over all rounds"


def summarise(
    config: Config,
    source: Path | None,
    verifier: dict[str, Any],
    questions: list[Question],
    folder: Path,
    served: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make acceptance.json of the records in `folder`.

    Args:
        source: the head's folder; None if nobody says which head a server has.
        verifier: what is known of its identity.
        served: of a server {engine, model, definition}.
    """
    everything = list(read_journal(folder / RECORDS))
    left_out = {record["id"]: record["left_out"] for record in everything if "left_out" in record}
    records = [record for record in everything if record["answers"]]
    if config.evaluate.engine is EvaluateEngine.server and config.evaluate.batch_size > 1:
        _forget_seconds(records)
    answered, heldout = ([r for r in records if (r["category"] == HELDOUT) is kind] for kind in (False, True))
    if not answered:
        why = "; ".join(left_out.values())[:300]
        raise ValueError(f"evaluate.questions: none was answered ({why}): cure that, and delete {folder}")
    num, timed = config.evaluate.draft_depth, config.evaluate.batch_size == 1
    names = list(answered[0]["answers"][0]["drafters"])
    found = {record["category"] for record in answered}
    categories = [name for name in dict.fromkeys(question.category for question in questions) if name in found]

    def drafters(of: list[Record]) -> dict[str, Any]:
        return {name: measured(of, name, num, timed) for name in names}

    return {
        **measured(answered, TRAINED, num, timed),
        **conditions(config, answered),
        "definition": DEFINITION,
        **(served or {}),
        "verifier": verifier,
        "head": os.path.relpath(source, config.run_folder) if source else None,
        **_lossless(records),
        "verifier_alone_tokens_per_s": alone_tokens_per_s(answered),
        "by_category": {name: drafters([r for r in answered if r["category"] == name]) for name in categories},
        **_by_modality(answered, drafters),
        **({"left_out": left_out} if left_out else {}),
        "baselines": {name: measured(answered, name, num, timed) for name in names if name != TRAINED},
        "heldout": {
            "num_conversations": len(heldout),
            "decoded": count(heldout, TRAINED, num).as_dict() if heldout else None,
            **(acceptance_in_training(source, [r["id"] for r in heldout], config.evaluate) if source else {}),
        },
    }


def _forget_seconds(records: list[Record]) -> None:
    """Count the seconds of requests that overlapped as none: their sum would make the rate of one stream."""
    for record in records:
        for answer in record["answers"]:
            for rounds in answer["drafters"].values():
                rounds["seconds"] = 0.0


def measured(records: list[Record], drafter: str, num_positions: int, timed: bool) -> dict[str, Any]:
    """Return all figures of a drafter on some questions; None for those that these do not have.

    Args:
        timed: each question was answered by itself; in a batch it only has a share of the seconds.
    """
    counts = count(records, drafter, num_positions)
    with_drafts, alone = counts.tokens_per_s, alone_tokens_per_s(records)
    return {
        **counts.as_dict(),
        "acceptance_length_interval": acceptance_interval(records, drafter, num_positions),
        "macro_acceptance_length": macro_acceptance_length(records, drafter, num_positions),
        "speedup": with_drafts / alone if with_drafts and alone else None,
        "speedup_interval": speedup_interval(records, drafter) if timed else None,
    }


def alone_tokens_per_s(records: list[Record]) -> float | None:
    """Return output tokens a second of the verifier without drafts; None where it was not run so (a server)."""
    answers = [answer for record in records for answer in record["answers"]]
    if not answers or any(answer["seconds_alone"] is None for answer in answers):
        return None
    seconds = sum(answer["seconds_alone"] for answer in answers)
    return sum(answer["output_tokens"] for answer in answers) / seconds if seconds else None


def conditions(config: Config, records: list[Record]) -> dict[str, Any]:
    """Return what a figure depends on besides verifier and head."""
    options = config.evaluate
    by_server = options.engine is EvaluateEngine.server  # which tells neither its dtype nor how it chooses drafts
    tree = {} if options.tree_depth is None else {"tree_depth": options.tree_depth, "tree_top_k": options.tree_top_k}
    sampling = {
        "seed": options.seed,
        "top_p": options.top_p,
        "top_k": options.top_k,
        **({} if by_server else {"draft_sampling": options.draft_sampling.value}),
    }
    return {
        "num_draft_tokens_per_round": options.num_draft_tokens,
        "drafting": "tree" if tree else "chain",
        **tree,
        "temperature": options.temperature,
        **(sampling if options.temperature else {}),
        "dtype": None if by_server else config.verifier.dtype.value,
        "engine": options.engine.value,
        "batch_size": options.batch_size,
        "questions": options.questions,
        "questions_digest": questions_digest(records),
        "num_questions": len(records),
        "max_tokens": options.max_tokens,
    }


def questions_digest(records: list[Record]) -> str:
    """Name what was asked, in whatever order and from wherever it was read."""
    return digest(sorted([record["turns"], record.get("images", 0)] for record in records))


def _lossless(records: list[Record]) -> dict[str, Any]:
    """Count the answers that equal the verifier's own, where they must: in this process, drafts not drawn."""
    decoded = [one for r in records for answer in r["answers"] for one in answer["drafters"].values()]
    equal = [one["equals_verifier"] for one in decoded if one.get("equals_verifier") is not None]
    return {"lossless": {"decoded_answers": len(equal), "equal_to_verifier": sum(equal)}} if equal else {}


def _by_modality(records: list[Record], drafters: Any) -> dict[str, Any]:
    with_images = [r for r in records if r.get("images")]
    if not with_images:
        return {}
    parts = {"text": [r for r in records if not r.get("images")], "images": with_images}
    return {"by_modality": {name: drafters(part) for name, part in parts.items() if part}}


def acceptance_in_training(source: Path, ids: list[str], options: EvaluateConfig) -> dict[str, float | None]:
    """Return the acceptance length that training found on these conversations; None if it did not measure them.

    Greedy decoding is compared with the walk, which makes the same rounds, sampling with the estimate, which is of
    drafts that are drawn too. Both are of chains: training measures no trees.
    """
    path = source / HELDOUT_WALKS
    known_of = options.tree_depth is None and options.draft_sampling is (
        DraftSampling.sampled if options.temperature else DraftSampling.greedy
    )
    by_depth = json.loads(path.read_text()) if path.is_file() and known_of else {}
    walks = by_depth.get(str(options.num_draft_tokens), {})
    name, gained, of = (
        ("estimated_acceptance_length_t1", "expected", "rows")
        if options.temperature
        else ("walked_acceptance_length", "accepted", "rounds")
    )
    known = [walked for sample_id, walked in walks.items() if conversation_id(sample_id) in ids]
    number = sum(walked.get(of, 0) for walked in known)
    return {name: 1 + sum(walked[gained] for walked in known) / number if number else None}
