"""Prompt-lookup drafting (transformers' own), as a baseline without a network."""

from __future__ import annotations

from torch import LongTensor, Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .acceptance import GREEDY, AcceptanceRule, Proposal


class PromptLookup:
    """Proposes what followed the first occurrence of the last tokens in the text so far."""

    name = "prompt lookup"

    def __init__(self, max_matching_ngram_size: int = 2) -> None:
        self._ngram = max_matching_ngram_size
        self._tokens: list[int] = []

    def start(self, prompt: list[int]) -> None:
        """Begin a new sequence."""
        self._tokens = prompt[:1]

    def extend(self, fed: list[int], aux_hidden_states: Tensor) -> None:
        """Add tokens of the text; the states are not used."""
        self._tokens += fed

    def propose(self, num_draft_tokens: int, rule: AcceptanceRule = GREEDY) -> Proposal:
        """Give at most `num_draft_tokens` tokens; none where nothing matches."""
        finder = PromptLookupCandidateGenerator(
            num_output_tokens=num_draft_tokens, max_matching_ngram_size=self._ngram, max_length=1 << 30
        )
        candidates, _ = finder.get_candidates(LongTensor([self._tokens]))
        return Proposal(candidates[0, len(self._tokens) :].tolist())


class NoDraft:
    """Proposes nothing: the verifier decodes alone."""

    name = "verifier alone"

    def start(self, prompt: list[int]) -> None:
        """Begin a new sequence."""

    def extend(self, fed: list[int], aux_hidden_states: Tensor) -> None:
        """Ignore the text."""

    def propose(self, num_draft_tokens: int, rule: AcceptanceRule = GREEDY) -> Proposal:
        """Give no token."""
        return Proposal([])
