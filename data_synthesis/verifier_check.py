"""What is checked of a verifier before anything is made with it: that a head can be trained for it at all."""

from __future__ import annotations

import sys
from typing import Any

from ..conf.schema import Config
from ..models.head.config import DraftHeadConfig
from ..models.head.vocabulary import check_vocabulary_size
from ..models.verifier.config import (
    empty_model,
    load_end_token_ids,
    load_tokenizer,
    load_whole_config,
    special_token_ids,
)
from ..models.verifier.model import find_decoder
from ..models.verifier.weights import VerifierWeights
from .tokens.chat_template import NoExactSpanError, prompt_tokens


def check_verifier(config: Config, for_states: bool = True) -> DraftHeadConfig:
    """Check that a head can be derived, layers and matrices are found and tokens have embeddings; give the head.

    Cheap: of the weights it reads names and headers.

    Args:
        for_states: a draft vocabulary is made now; answers need none, and one that does not fit is only told.

    Raises:
        ValueError: names the option, and what to do.
    """
    whole = load_whole_config(config.verifier)
    head = DraftHeadConfig.from_verifier(config.draft, whole.get_text_config())
    find_decoder(empty_model(whole))
    _check_tokens(config, head, for_states)
    VerifierWeights(config.verifier).check()
    return head


def _check_tokens(config: Config, head: DraftHeadConfig, for_states: bool) -> None:
    always = special_token_ids(config.verifier)
    try:
        check_vocabulary_size(head.draft_vocab_size, head.vocab_size, len(always))
    except ValueError as error:
        if for_states:
            raise
        print(f"synthesize: `fledge dump` will refuse this: {error}", file=sys.stderr)
    tokenizer = load_tokenizer(config.verifier)
    ends = load_end_token_ids(config.verifier, tokenizer)
    try:
        written = prompt_tokens(tokenizer, [{"role": "user", "content": "Name a colour."}])
    except NoExactSpanError:  # it wants other conversations
        written = []
    beyond = [token for token in written if token >= head.vocab_size]
    if not beyond and ends and min(ends) >= head.vocab_size:
        beyond = ends
    if beyond:
        token: Any = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ValueError(
            f"verifier.path {config.verifier.path!r}: its tokenizer writes {token!r} in every conversation, token "
            f"{beyond[0]}, and its embedding has {head.vocab_size} rows: save the tokenizer and chat template that "
            "these weights were trained with beside them"
        )
