"""Prompt-lookup drafting (transformers' own), as a baseline without a network; and no drafting at all."""

import torch
from torch import LongTensor, Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .proposal import NOTHING, Drafter, NewRows, Proposal


class PromptLookup(Drafter):
    """Proposes what followed the first occurrence of the last two tokens, or of the last one, in the text so far."""

    def __init__(self, num_draft_tokens: int, num_sequences: int = 1) -> None:
        self.num_draft_tokens = self.depth = num_draft_tokens
        self._lookup = PromptLookupCandidateGenerator(
            num_output_tokens=num_draft_tokens, max_matching_ngram_size=2, max_length=1 << 30
        )
        self._texts = [[NOTHING] for _ in range(num_sequences)]  # but for their first tokens

    def extend(self, rows: NewRows, aux_hidden_states: Tensor) -> None:
        """Add tokens of the texts; the states are not used."""
        new = (values.tolist() for values in (rows.fed, rows.lengths, rows.counts))
        places = range(len(self._texts))[rows.sequences]
        for place, tokens, length, count in zip(places, *new, strict=True):
            self._texts[place] = self._texts[place][:length] + tokens[:count]

    def propose(self, draws: Tensor, num_read: int) -> Proposal:
        """Propose at most `num_draft_tokens` tokens; none if nothing matches."""
        rows = []
        for text in self._texts:
            candidates, _ = self._lookup.get_candidates(LongTensor([text]))
            tokens = candidates[0, len(text) :].tolist()
            rows.append(tokens + [NOTHING] * (self.num_draft_tokens - len(tokens)))
        return Proposal(torch.tensor(rows, device=draws.device))


class NoDraft(Drafter):
    """Proposes nothing: the verifier decodes alone."""

    on_device = True

    def propose(self, draws: Tensor, num_read: int) -> Proposal:
        """Propose no token."""
        return Proposal(torch.empty(len(draws), 0, dtype=torch.int64, device=draws.device))
