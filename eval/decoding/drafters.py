"""The drafters that an evaluation measures, by name, an entry each (docs/internals/add_a_drafter.md)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...conf.schema import EvaluateConfig
from ...models.head.architectures import build_head
from ...models.head.draft_head import DraftHead, initialise
from ...models.head.vocabulary import VocabularyMap
from ...models.verifier.weights import VerifierWeights
from ..figures.records import LOOKUP, TRAINED, UNTRAINED
from .acceptance import AcceptanceRule
from .head_drafter import DraftDecoder
from .prompt_lookup import PromptLookup
from .proposal import Drafter


class DrafterInputs(NamedTuple):
    """What drafters are made of."""

    head: DraftHead  # that is evaluated
    weights: VerifierWeights
    embedding: Tensor  # the verifier's [V, H], in the dtype and on the device of decoding
    options: EvaluateConfig
    rule: AcceptanceRule
    seed: int  # of what is drawn


def _head_drafter(head: DraftHead, inputs: DrafterInputs) -> DraftDecoder:
    options, embedding = inputs.options, inputs.embedding
    shape = options.num_draft_tokens, options.tree_depth, options.tree_top_k
    return DraftDecoder(head.to(embedding.device, embedding.dtype), embedding, *shape, inputs.rule, options.batch_size)


def _untrained(inputs: DrafterInputs) -> DraftDecoder:
    head = build_head(inputs.head.config, VocabularyMap(inputs.head.d2t, inputs.head.t2d))
    initialise(head, inputs.weights.embedding(), inputs.weights.lm_head(), inputs.seed)
    return _head_drafter(head, inputs)


DRAFTERS: dict[str, Callable[[DrafterInputs], Drafter]] = {  # the first is evaluated, the others are its baselines
    TRAINED: lambda inputs: _head_drafter(inputs.head, inputs),
    UNTRAINED: _untrained,
    LOOKUP: lambda inputs: PromptLookup(inputs.options.draft_depth, inputs.options.batch_size),
}
