"""The results of an evaluation: acceptance.json, made of the records of its questions."""

import os
from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import digest
from ...conf.runtime.journal import read_journal
from ...conf.schema import Config, DraftSampling, Dtype, EvaluateConfig, EvaluateEngine
from ...data_synthesis.heldout import conversation_id
from ...models.formats.training_folder import read_walks
from ..questions.question import Question
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
    """Return acceptance.json, made of the records in `folder`.

    Args:
        source: the head's folder; None if only a server knows it.
        verifier: what is known of its identity.
        served: of a server {engine, model, definition}.
    """
    options = config.evaluate
    everything = list(read_journal(folder / RECORDS))
    left_out = {record["id"]: record["left_out"] for record in everything if "left_out" in record}
    records = [record for record in everything if record["answers"]]
    answered, heldout = ([r for r in records if (r["category"] == HELDOUT) is kind] for kind in (False, True))
    if not answered:
        why = "; ".join(left_out.values())[:300]
        raise ValueError(f"evaluate.questions: none was answered ({why}): cure that, and delete {folder}")
    rounds = [one for record in records for answer in record["answers"] for one in answer["drafters"].values()]
    equal = [one["equals_verifier"] for one in rounds if one.get("equals_verifier") is not None]
    categories = dict.fromkeys(question.category for question in questions)
    groups = {"by_category": {name: [r for r in answered if r["category"] == name] for name in categories}}
    with_images = [record for record in answered if record.get("images")]
    if with_images:
        groups["by_modality"] = {"text": [r for r in answered if not r.get("images")], "images": with_images}

    def drafters(part: list[Record]) -> dict[str, Any]:
        return {name: _figures(part, name, options) for name in answered[0]["answers"][0]["drafters"]}

    baselines = drafters(answered)
    return {
        **baselines.pop(TRAINED),
        **_conditions(options, config.verifier.dtype, answered),
        "definition": DEFINITION,
        **(served or {}),
        "verifier": verifier,
        "head": os.path.relpath(source, config.run_folder) if source else None,
        **({"lossless": {"decoded_answers": len(equal), "equal_to_verifier": sum(equal)}} if equal else {}),
        "verifier_alone_tokens_per_s": _alone_tokens_per_s(answered),
        **{kind: {name: drafters(part) for name, part in parts.items() if part} for kind, parts in groups.items()},
        **({"left_out": left_out} if left_out else {}),
        "baselines": baselines,
        "heldout": _heldout(heldout, source, options),
    }


def _heldout(records: list[Record], source: Path | None, options: EvaluateConfig) -> dict[str, Any]:
    """Return what held-out conversations accepted, and what training measured on them: of those that it did, if any."""
    walked = {conversation_id(name) for walk in read_walks(source).values() for name in walk} if source else set()
    compared = [record for record in records if record["id"] in walked] or records
    others = len(records) - len(compared)
    return {
        "num_conversations": len(compared),
        **({"not_measured_in_training": others} if others else {}),
        "decoded": count(compared, TRAINED, options.draft_depth).as_dict() if compared else None,
        **(acceptance_in_training(source, [record["id"] for record in compared], options) if source else {}),
    }


def _figures(records: list[Record], drafter: str, options: EvaluateConfig) -> dict[str, Any]:
    """Return all figures of a drafter on some questions; None for those that these do not have."""
    counted = records, drafter, options.draft_depth
    counts = count(*counted)
    with_drafts, alone = counts.tokens_per_s, _alone_tokens_per_s(records)
    return {
        **counts.as_dict(),
        "acceptance_length_interval": acceptance_interval(*counted),
        "macro_acceptance_length": macro_acceptance_length(*counted),
        "speedup": with_drafts / alone if with_drafts and alone else None,
        # A question in a batch has no time of its own.
        "speedup_interval": speedup_interval(records, drafter) if options.batch_size == 1 else None,
    }


def _alone_tokens_per_s(records: list[Record]) -> float | None:
    """Return output tokens a second of the verifier without drafts; None if it was not run so (a server)."""
    answers = [answer for record in records for answer in record["answers"]]
    if not answers or any(answer["seconds_alone"] is None for answer in answers):
        return None
    seconds = sum(answer["seconds_alone"] for answer in answers)
    return sum(answer["output_tokens"] for answer in answers) / seconds if seconds else None


def _conditions(options: EvaluateConfig, dtype: Dtype, records: list[Record]) -> dict[str, Any]:
    """Return what a figure depends on besides verifier and head."""
    by_server = options.engine is EvaluateEngine.server  # which tells neither its dtype nor how it chooses drafts
    names = [] if options.tree_depth is None else ["tree_depth", "tree_top_k"]
    names += ["temperature", *(("seed", "top_p", "top_k") if options.temperature else ())]
    return {
        "num_draft_tokens_per_round": options.num_draft_tokens,
        "drafting": "chain" if options.tree_depth is None else "tree",
        **{name: getattr(options, name) for name in names},
        **({"draft_sampling": options.draft_sampling.value} if options.temperature and not by_server else {}),
        "dtype": None if by_server else dtype.value,
        "engine": options.engine.value,
        "batch_size": options.batch_size,
        "questions": options.questions,
        "questions_digest": questions_digest(records),
        "num_questions": len(records),
        "max_tokens": options.max_tokens,
    }


def questions_digest(records: list[Record]) -> str:
    """Return a digest of what was asked, in whatever order and from wherever it was read."""
    return digest(sorted([record["turns"], record.get("images", 0)] for record in records))


def acceptance_in_training(source: Path, ids: list[str], options: EvaluateConfig) -> dict[str, float | None]:
    """Return the acceptance length that training measured on these conversations; None if it did not measure them.

    Greedy decoding is compared with teacher-forced rounds, which are the same, sampling with the estimate, which is of
    drafts that are drawn too. Both are of chains: training measures no trees.
    """
    greedy = not options.temperature
    drafts = DraftSampling.greedy if greedy else DraftSampling.sampled
    is_measured = options.tree_depth is None and options.draft_sampling is drafts
    counts = read_walks(source).get(options.num_draft_tokens, {}).items() if is_measured else ()
    known = [one for sample_id, one in counts if conversation_id(sample_id) in ids]
    gained, rounds = ("accepted", "rounds") if greedy else ("expected", "rows")
    number = sum(one.get(rounds, 0) for one in known)
    name = "walked_acceptance_length" if greedy else "estimated_acceptance_length_t1"
    return {name: 1 + sum(one[gained] for one in known) / number if number else None}
