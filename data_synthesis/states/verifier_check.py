"""What is checked of a verifier before anything is made with it: that a head can be trained for it at all."""

import sys
from typing import Any

from ...conf.schema import DraftConfig, VerifierConfig
from ...models.head.config import DraftHeadConfig
from ...models.head.vocabulary import check_vocabulary_size
from ...models.verifier.config import (
    empty_model,
    load_end_token_ids,
    load_tokenizer,
    load_whole_config,
    special_token_ids,
)
from ...models.verifier.model import find_decoder
from ...models.verifier.weights import VerifierWeights
from ..tokens.chat_template import NoExactSpanError, prompt_tokens


def check_verifier(verifier: VerifierConfig, draft: DraftConfig, for_states: bool = True) -> DraftHeadConfig:
    """Check that a head can be derived, layers and matrices are found and tokens have embeddings; return the head.

    Cheap: of the weights it reads names and headers. A draft vocabulary that does not fit costs a warning if it is not
    needed now, `for_states`; else ValueError names the option, and what to do.
    """
    whole = load_whole_config(verifier)
    head = DraftHeadConfig.from_verifier(draft, whole.get_text_config())
    find_decoder(empty_model(whole))
    try:
        check_vocabulary_size(head.draft_vocab_size, head.vocab_size, len(special_token_ids(verifier)))
    except ValueError as error:
        if for_states:
            raise
        print(f"synthesize: `fledge dump` will refuse this: {error}", file=sys.stderr)
    _check_tokens(verifier, head.vocab_size)
    VerifierWeights(verifier).check()
    return head


def _check_tokens(verifier: VerifierConfig, vocab_size: int) -> None:
    tokenizer = load_tokenizer(verifier)
    ends = load_end_token_ids(verifier, tokenizer)
    try:
        written = prompt_tokens(tokenizer, [{"role": "user", "content": "Name a colour."}])
    except NoExactSpanError:  # it wants other conversations
        written = []
    beyond = [token for token in written if token >= vocab_size]
    if not beyond and ends and min(ends) >= vocab_size:
        beyond = ends
    if beyond:
        token: Any = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ValueError(
            f"verifier.path {verifier.path!r}: its tokenizer writes {token!r} in every conversation, token "
            f"{beyond[0]}, and its embedding has {vocab_size} rows: save the tokenizer and chat template that these "
            "weights were trained with next to them"
        )
