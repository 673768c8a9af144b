"""The whole loop of speculative decoding, small and random, for the interpreter (CPU) and for a GPU alike.

Needs torch, transformers and triton alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from decoding import Options, make_models
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.speculator import Answer, Request, Speculator
from fledge.models.kernels import DECODING

SHAPES = {"chain": (4,), "tree": (12, 4, 4)}
SMALL = Options(
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    draft_vocab_size=30,
)


class Loop:
    """A small random verifier and head, and prompts of several lengths."""

    def __init__(
        self, device: str = "cpu", dtype: str = "float32", max_tokens: int = 24, window: int | None = None
    ) -> None:
        self.max_tokens = max_tokens
        self.verifier, self.head = make_models(replace(SMALL, device=device, dtype=dtype))
        self.head.config = replace(self.head.config, sliding_window=window, window_layers=(0,) if window else ())
        with torch.no_grad():
            self.verifier.model.lm_head.weight.mul_(20)  # sharper than chance
        self.embedding = self.verifier.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(40, (n,), generator=generator).tolist() for n in (9, 4, 17)]

    def speculator(self, shape: str, rule: AcceptanceRule, **options: bool) -> tuple[Speculator, DraftDecoder]:
        """Give a speculator that has read the prompts, and its drafter."""
        rule = replace(rule, kernels=DECODING if options.pop("kernels", False) else frozenset())
        num_tokens, *tree = SHAPES[shape]
        drafter = DraftDecoder(self.head, self.embedding, num_tokens, *(tree or [None, 1]), rule, len(self.prompts))
        speculator = Speculator(self.verifier, [drafter], rule, len(self.prompts), **options)
        speculator.prefill([Request(prompt, self.max_tokens, str(n)) for n, prompt in enumerate(self.prompts)])
        return speculator, drafter

    def answers(self, shape: str, rule: AcceptanceRule, **options: bool) -> tuple[list[Answer], list[Answer]]:
        """Answer with a draft head, and by the verifier alone."""
        speculator, drafter = self.speculator(shape, rule, **options)
        return speculator.decode(drafter), speculator.decode(NoDraft())
