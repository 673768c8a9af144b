"""What the verifier reads before a user's turn, and the token that ends one: found by rendering its template."""

from collections import abc
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from .chat_template import Message, prompt_tokens

_SAMPLES = ("What is this", "how do I", "Name a colour", "3 plus 4")  # no two begin alike


@dataclass(frozen=True)
class UserTurn:
    """A user's turn to come, in the verifier's tokens."""

    header: list[int]  # all that stands before it
    end: int  # the token that ends it
    marks: frozenset[int]  # tokens that no user writes: special ones, and those that the template writes


def find_user_turn(
    tokenizer: PreTrainedTokenizerBase, history: abc.Sequence[Message], end_token_ids: abc.Collection[int]
) -> UserTurn:
    """Return the user's turn that follows a conversation; an empty one is followed by the first.

    The header is what the renderings of different turns have in common at their begin: so a space that a tokenizer
    takes into the turn's first word is not part of it. Raises NoExactSpanError if the template refuses the
    conversation, ValueError if it writes nothing before a user's turn or ends it with no token of its own.
    """
    marks = _find_marks(tokenizer, str(tokenizer.get_chat_template()), frozenset(end_token_ids))
    turns = [[*history, {"role": "user", "content": sample}] for sample in _SAMPLES]
    renderings = [prompt_tokens(tokenizer, turn) for turn in turns]
    header = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*renderings, strict=False))]
    if set(header) <= {tokenizer.bos_token_id}:
        raise _unknown("writes nothing before it")
    ends = set[int]()
    for sample, tokens in zip(_SAMPLES, renderings, strict=True):
        rest = tokens[len(header) :]
        length = next((place for place, token in enumerate(rest) if token in marks), len(rest))
        ends.update(rest[length : length + 1] or [-1])
        text = str(tokenizer.decode(rest[:length]))
        if not text.lstrip().startswith(sample):
            raise _unknown(f"writes {text[:40]!r} where it begins")
        if text.strip() != sample or length == len(rest):
            raise _unknown(
                f"ends it with {text.strip().removeprefix(sample).strip()[:40]!r}, which is no token of its own"
            )
    if len(ends) > 1:
        raise _unknown("ends it with different tokens")
    return UserTurn(header, ends.pop(), marks)


@lru_cache(maxsize=8)
def _find_marks(tokenizer: PreTrainedTokenizerBase, template: str, end_token_ids: frozenset[int]) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    of_template = (number for number, token in added if token.special or token.content in template)
    return frozenset({*end_token_ids, *tokenizer.all_special_ids, *of_template})


def _unknown(problem: str) -> ValueError:
    return ValueError(
        f"data.sources self: the chat template of verifier.path tells no user's turn that the verifier could write "
        f"itself: it {problem}; take prompts from a dataset"
    )
