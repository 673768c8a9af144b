"""The preview command: one conversation in its tokens, those that the verifier wrote coloured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import differences, read_manifest
from ..conf.schema import Config, DumpConfig
from ..models.verifier.config import tokenizer_identity
from .conversations import read_conversations
from .heldout import is_heldout
from .show import marked_text, printable, terminal_mark
from .tokens.chat_template import Sequence, has_images
from .tokens.images import UnreadableImagesError
from .tokens.sequences import SequenceReader, answers_within, has_recorded_tokens, leading_answers, num_whole_answers


def preview(config: Config) -> None:
    """Print the conversation preview.id of runs/<name>/conversations/, or the first; more may still be written."""
    folder = config.conversations_folder
    settings = read_manifest(folder, "conversations", unfinished=True)["settings"]
    record = find_conversation(folder, config.preview.id)
    reader = SequenceReader(config.verifier, config.dump.max_images, config.data.local_images)
    own = tokenizer_identity(reader.tokenizer)
    if changes := differences({name: settings["verifier"][name] for name in own}, own):
        raise ValueError(
            f"{folder} was made with another tokenizer or chat template than that of "
            f"verifier.path={config.verifier.path} ({'; '.join(changes)}): set the verifier it was made with"
        )
    for name, value in _facts(record, is_heldout(record["id"], settings["heldout_share"])).items():
        print(f"{name:<12} {printable(value)}")
    try:
        sequences = reader.read(record)
    except UnreadableImagesError as error:
        print(f"\ndump leaves it out: {printable(str(error))}")
        return
    mark = terminal_mark()
    for number, sequence in enumerate(sequences, 1):
        print(f"\nsequence {number} of {len(sequences)}: {_sizes([sequence])}\n")
        print(marked_text(reader.tokenizer, sequence, mark))
    print(f"\n{len(sequences)} sequence{'s' * (len(sequences) != 1)}, {_sizes(sequences)}")
    for line in _left_out(record, sequences, config.dump):
        print(line)


def find_conversation(folder: Path, name: str | None) -> dict[str, Any]:
    """Return a conversation by its id, the first for None; raise ValueError if it is not there."""
    for record in read_conversations(folder, unfinished=True):
        if name in (None, record["id"]):
            return record
    if name is None:
        raise ValueError(f"{folder} holds no conversation yet: wait until `fledge synthesize` has written one")
    raise ValueError(f"preview.id: {folder} holds no conversation {name!r}: without preview.id the first is shown")


def _facts(record: dict[str, Any], heldout: bool) -> dict[str, str]:
    return {
        "conversation": record["id"],
        "source": record["source"],
        "answers": ", ".join(record["finish_reasons"]),
        "usage": ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in record["usage"].items()),
        **({"temperature": str(record["temperature"])} if "temperature" in record else {}),
        "split": "held out" if heldout else "training",
        "tokens from": "the backend" if has_recorded_tokens(record) else "the chat template",
    }


def _left_out(record: dict[str, Any], sequences: list[Sequence], options: DumpConfig) -> Iterator[str]:
    """Yield what of a conversation `fledge dump` would leave out, in sentences."""
    if has_images(record["messages"]):
        yield "online training leaves it out: it has images, which only the verifier of a dump is given"
    num_whole = num_whole_answers(record["finish_reasons"])
    if num_whole < len(record["finish_reasons"]) and not options.keep_truncated:
        sequences = leading_answers(sequences, num_whole)
        yield f"trained on without the truncated answer: {_sizes(sequences)}"
    for number, sequence in enumerate(sequences, 1):
        within = answers_within(sequence, options.max_length)
        if within != [sequence]:
            what = f"cuts sequence {number} to {_sizes(within)}" if within else f"leaves out sequence {number}"
            size = len(sequence.token_ids)
            yield f"dump {what}: its {size} tokens are more than dump.max_length={options.max_length}"


def _sizes(sequences: list[Sequence]) -> str:
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    counted = sum(end - start for sequence in sequences for start, end in sequence.answers)
    return f"{tokens} tokens, {counted} of them written by the verifier"
