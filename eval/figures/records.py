"""The files of an evaluation, and the records of its questions.

A record is a line of questions.jsonl: {id, category, turns, answers}, and `images`, what tells them apart, if there are
any, and `left_out`, why there are no answers or no further ones, if so. An answer is {text, prompt_tokens,
output_tokens, seconds_alone, drafters}. A drafter is {drafted, accepted, output_tokens, seconds, equals_verifier}, the
first two lists over rounds; the trained head has `token_texts` too, what each token of its answer adds to the text, and
`refused_texts`, of each round the text of the draft that was refused, null if all were accepted. A server reports sums
instead ({num_drafts, num_draft_tokens, num_accepted_tokens, num_accepted_tokens_per_pos}), and seconds_alone is null.
"""

from pathlib import Path
from typing import Any

from ...conf.runtime.journal import read_journal

ACCEPTANCE, RECORDS = "acceptance.json", "questions.jsonl"
HELDOUT = "heldout"  # the category of held-out conversations
TRAINED, UNTRAINED, LOOKUP = "trained head", "untrained head", "prompt lookup"

Record = dict[str, Any]  # a line of questions.jsonl
Part = str | tuple[list[str], list[list[str]]]  # of a report: lines, or a table's head and rows


def answered_records(folder: Path) -> list[Record]:
    """Return the records of an evaluation's answered questions, without the held-out conversations."""
    return [record for record in read_journal(folder / RECORDS) if record["category"] != HELDOUT and record["answers"]]
