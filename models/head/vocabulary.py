"""The draft vocabulary: the verifier's tokens that a draft head can propose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VocabularyMap:
    """Which of the verifier's tokens are in the draft vocabulary."""

    d2t: Tensor  # int64 [Vd], offsets: target id = draft id + d2t[draft id]
    t2d: Tensor  # bool [V], whether a target id is inside

    @property
    def target_ids(self) -> Tensor:
        """Return the target id of every draft id, ascending (int64 [Vd])."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


def build_vocabulary(token_counts: Tensor, size: int | None, always: Iterable[int] = ()) -> VocabularyMap:
    """Choose the `size` most frequent tokens, ties to the lower id.

    Args:
        token_counts: int64 [V], occurrences among counted positions; float64 if they are weighed.
        size: Vd; None or V for the full vocabulary.
        always: ids that are inside whatever their count (special and end-of-turn tokens).
    """
    vocab_size = len(token_counts)
    size = vocab_size if size is None else size
    always = sorted({token for token in always if token < vocab_size})  # tokenizers may know tokens beyond
    check_vocabulary_size(size, vocab_size, len(always))
    ranked = token_counts.clone()
    ranked[always] = torch.iinfo(torch.int64).max
    chosen = torch.argsort(ranked, descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    return VocabularyMap(d2t=chosen - torch.arange(size), t2d=t2d)


def check_vocabulary_size(size: int, vocab_size: int, always: int = 1) -> None:
    """Refuse a draft vocabulary that is larger than the verifier's or smaller than what it must hold."""
    least = max(1, always)
    if not least <= size <= vocab_size:
        raise ValueError(f"draft.vocab_size must lie between {least} and the verifier's {vocab_size}, got {size}")


def coverage(token_counts: Tensor, vocabulary: VocabularyMap) -> float:
    """Return the share of counted occurrences that the draft vocabulary covers; it bounds acceptance."""
    total = int(token_counts.sum())
    return float(token_counts[vocabulary.t2d].sum()) / total if total else 1.0
