"""The preview command: one conversation in its tokens, those that the verifier wrote coloured."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..conf.runtime.artifact import differences, read_manifest
from ..conf.schema import Config, DumpConfig, VerifierConfig
from ..models.verifier.config import tokenizer_identity
from .conversations import read_conversations
from .heldout import is_heldout
from .tokens.chat_template import Sequence, has_images
from .tokens.images import UnreadableImagesError
from .tokens.sequences import SequenceReader, answers_within, has_recorded_tokens, leading_answers, num_whole_answers

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal might obey


def preview(config: Config) -> None:
    """Print the conversation preview.id of runs/<name>/conversations/, or the first; more may still be written."""
    folder = config.conversations_folder
    settings = read_manifest(folder, "conversations", unfinished=True)["settings"]
    record = find_conversation(folder, config.preview.id)
    reader = SequenceReader(config.verifier, config.dump.max_images, config.data.local_images)
    _check_tokenizer(folder, settings["verifier"], config.verifier, reader.tokenizer)
    unreadable, sequences = "", []
    try:
        sequences = reader.read(record)
    except UnreadableImagesError as error:
        unreadable = str(error)
    for name, value in _facts(record, is_heldout(record["id"], settings["heldout_share"])).items():
        print(f"{name:<12} {printable(value)}")
    if unreadable:
        print(f"\ndump leaves it out: {printable(unreadable)}")
        return
    mark = terminal_mark()
    for number, sequence in enumerate(sequences, 1):
        print(f"\nsequence {number} of {len(sequences)}: {_sizes([sequence])}\n")
        print(marked_text(reader.tokenizer, sequence, mark))
    print(f"\n{len(sequences)} sequence{'s' * (len(sequences) != 1)}, {_sizes(sequences)}")
    for line in _left_out(record, sequences, config.dump):
        print(line)


def find_conversation(folder: Path, wanted: str | None) -> dict[str, Any]:
    """Find a conversation by its id, the first for None.

    Raises:
        ValueError: it is not there, or a line before it is malformed.
    """
    records = read_conversations(folder, unfinished=True)
    found = next((record for record in records if wanted in (None, record["id"])), None)
    if found:
        return found
    if wanted is None:
        raise ValueError(f"{folder} holds no conversation yet: wait until `fledge synthesize` has written one")
    raise ValueError(f"preview.id: {folder} holds no conversation {wanted!r}: without preview.id the first is shown")


def _check_tokenizer(
    folder: Path, recorded: dict[str, Any], config: VerifierConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = tokenizer_identity(tokenizer)
    changes = differences({name: recorded[name] for name in own}, own)
    if changes:
        raise ValueError(
            f"{folder} was made with another tokenizer or chat template than that of verifier.path={config.path} "
            f"({'; '.join(changes)}): set the verifier it was made with"
        )


def _facts(record: dict[str, Any], heldout: bool) -> dict[str, str]:
    usage = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in record["usage"].items())
    return {
        "conversation": record["id"],
        "source": record["source"],
        "answers": ", ".join(record["finish_reasons"]),
        "usage": usage,
        **({"temperature": str(record["temperature"])} if "temperature" in record else {}),
        "split": "held out" if heldout else "training",
        "tokens from": "the backend" if has_recorded_tokens(record) else "the chat template",
    }


def _left_out(record: dict[str, Any], sequences: list[Sequence], options: DumpConfig) -> Iterator[str]:
    """Say what of a conversation `fledge dump` would leave out."""
    if has_images(record["messages"]):
        yield "online training leaves it out: it has images, which only the verifier of a dump is given"
    num_whole = num_whole_answers(record["finish_reasons"])
    if num_whole < len(record["finish_reasons"]) and not options.keep_truncated:
        sequences = leading_answers(sequences, num_whole)
        yield f"trained on without the truncated answer: {_sizes(sequences)}"
    for number, sequence in enumerate(sequences, 1):
        kept = answers_within(sequence, options.max_length)
        if kept != [sequence]:
            what = f"cuts sequence {number} to {_sizes(kept)}" if kept else f"leaves out sequence {number}"
            size = len(sequence.token_ids)
            yield f"dump {what}: its {size} tokens are more than dump.max_length={options.max_length}"


def _sizes(sequences: Iterable[Sequence]) -> str:
    listed = list(sequences)
    tokens = sum(len(sequence.token_ids) for sequence in listed)
    counted = sum(end - start for sequence in listed for start, end in sequence.answers)
    return f"{tokens} tokens, {counted} of them written by the verifier"


def marked_text(tokenizer: PreTrainedTokenizerBase, sequence: Sequence, mark: Callable[[str], str]) -> str:
    """Decode a sequence with its answers marked; each run of tokens as one, so that no character is torn.

    An image is told by its number and tokens.
    """
    images = [
        (*image.span, f"[image {n}: {len(range(*image.span))} tokens]") for n, image in enumerate(sequence.images, 1)
    ]
    text, place = "", 0
    for start, end, told in sorted([*images, *((start, end, "") for start, end in sequence.answers)]):
        text += _decoded(tokenizer, sequence.token_ids[place:start])
        text += told or mark(_decoded(tokenizer, sequence.token_ids[start:end]))
        place = end
    return text + _decoded(tokenizer, sequence.token_ids[place:])


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return printable(str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)))


def printable(text: str) -> str:
    """Write control characters as escapes, so that a terminal shows a text instead of obeying it."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def terminal_mark() -> Callable[[str], str]:
    """Give what marks a text: a colour on a terminal, brackets elsewhere."""
    return _coloured if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else _bracketed


def _coloured(text: str) -> str:
    return f"\x1b[32m{text}\x1b[0m"


def _bracketed(text: str) -> str:
    return f"⟦{text}⟧"
