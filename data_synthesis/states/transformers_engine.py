"""What the verifier sees inside while it reads documents, many of them in one forward pass."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...conf.schema import VerifierConfig
from ...models.verifier.config import logit_transform
from ...models.verifier.model import Verifier, check_capture
from ...models.verifier.weights import VerifierWeights
from ..store.host_copies import to_device
from ..store.shard import Sample
from ..store.state_format import FLOAT8, StateFormat, decode
from ..tokens.image_tokens import ImageReader
from ..tokens.images import UnreadableImagesError

_LOGITS_AGREE = 2e-2  # of the largest logit: bfloat16 sums in another order
_CHECKED_TOKENS = 512  # of the first sample: the model's own hidden states and logits are large
_FLOAT8_TOKENS = 32  # of them, at which the distribution is compared


def never() -> bool:
    """Return that nothing is to be stopped."""
    return False


class TransformersEngine:
    """The verifier in this process; `images` reads those of samples.

    Attributes:
        unlike: whether each batch read gives other logits than training will (bool [], on its device).
    """

    def __init__(self, verifier: Verifier, batch_tokens: int, images: ImageReader | None = None) -> None:
        self._verifier, self._batch_tokens, self._images = verifier, batch_tokens, images
        self.unlike: list[Tensor] = []

    def read(self, samples: Sequence[Sample], stop: Callable[[], bool] = never) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each sample's number, aux [T, A*H] and last hidden states [T, H] (final norm applied), in any order.

        Samples of similar length are read together, and each that has images alone. `stop` is called before every
        batch, when all samples of those before have been taken.
        """
        numbers = [number for number, sample in enumerate(samples) if not sample.images]
        documents = [samples[number].input_ids for number in numbers]
        unlike = self.unlike = []
        read = read_documents(self._verifier, documents, self._batch_tokens, unlike, max_padding=0.125, stop=stop)
        for place, aux, last in read:
            yield numbers[place], aux, last
        for number in (number for number, sample in enumerate(samples) if sample.images):
            if stop():
                break
            assert self._images is not None
            yield number, *_read_with_images(self._verifier, self._images, samples[number], unlike)
        refuse_unlike(unlike)

    def close(self) -> None:
        """Nothing was started."""


def read_documents(
    verifier: Verifier,
    documents: Sequence[Tensor],
    batch_tokens: int,
    unlike: list[Tensor] | None = None,
    check: bool = True,
    max_padding: float = 0.5,
    stop: Callable[[], bool] = never,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the number, aux [T, A*H] and last hidden states [T, H] of documents (token ids [T]), longest first.

    Documents of similar length share a forward pass, padded on the right: causal attention keeps the padding out of
    every state that is returned.

    Args:
        batch_tokens: tokens of one forward, padding included; a longer document is read alone.
        unlike: gets another of `_unlike_logits` before each forward's documents; None: refused here, at the end.
        check: make sure that `lm_head` times the last state is the model's logits, with one wait for all.
        max_padding: share of the longest's length that may be padding.
    """
    found: list[Tensor] = [] if unlike is None else unlike
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    while by_length and not stop():
        batch = [by_length.pop()]  # the longest left sets the width
        width = len(documents[batch[0]])
        shortest = (1 - max_padding) * width
        while by_length and (len(batch) + 1) * width <= batch_tokens and len(documents[by_length[-1]]) >= shortest:
            batch.append(by_length.pop())
        padded = torch.nn.utils.rnn.pad_sequence([documents[i].long() for i in batch], batch_first=True)
        output = verifier.forward(to_device(padded, verifier.device), logits_to_keep=1, use_cache=False)
        if check:
            found.append(_unlike_logits(verifier, output.last_hidden_state[:, -1:], output.logits))
        for row, number in enumerate(batch):
            end = len(documents[number])
            yield number, output.aux_hidden_states[row, :end], output.last_hidden_state[row, :end]
    if unlike is None:
        refuse_unlike(found)


def _read_with_images(
    verifier: Verifier, images: ImageReader, sample: Sample, unlike: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return aux [T, A*H] and last hidden states [T, H] of a sample, and append to `unlike`."""
    try:
        digests = sample.image_record.digests if sample.image_record else None
        inputs = images.model_inputs(sample.input_ids, images.read(sample.images), digests)
    except UnreadableImagesError as error:
        raise ValueError(
            f"sample {sample.id}: {error}; give the images back as they were and run `fledge dump` again"
        ) from None
    input_ids = to_device(sample.input_ids.long()[None], verifier.device)
    output = verifier.forward(input_ids, logits_to_keep=1, use_cache=False, **verifier.place(inputs))
    unlike.append(_unlike_logits(verifier, output.last_hidden_state[:, -1:], output.logits))
    return output.aux_hidden_states[0], output.last_hidden_state[0]


def check_first(config: VerifierConfig, verifier: Verifier, input_ids: Tensor, form: StateFormat) -> None:
    """Check on a sample's tokens (int32 [T]) that what a dump will store is what training takes it for.

    The states are the model's own, and its logits are the checkpoint's lm_head times the state as it is stored.
    """
    tokens = input_ids[:_CHECKED_TOKENS].long()[None].to(verifier.device)
    check_capture(verifier, tokens)
    output = verifier.forward(tokens, logits_to_keep=1, use_cache=False)
    state = output.last_hidden_state[0, -_FLOAT8_TOKENS:].cpu()
    transform, lm_head = logit_transform(verifier.model.config.get_text_config()), VerifierWeights(config).lm_head()
    both = state.float(), decode(*form.encode(state, 1), torch.float32)  # as it is, and as it is stored
    exact, logits = (transform.apply_(last @ lm_head.float().T) for last in both)
    expected = output.logits[0].float().cpu()
    compared = (exact if form.dtype == FLOAT8 else logits)[-1:]
    error = float((compared - expected).abs().amax() / expected.abs().amax())
    if not error <= _LOGITS_AGREE:
        raise ValueError(
            f"verifier.path {config.path!r}: its logits are not its lm_head times the state that is stored, by "
            f"{error:.2g} of the largest, so that training would have wrong targets"
        )
    if form.dtype == FLOAT8:
        p, q = exact.log_softmax(-1), logits.log_softmax(-1)
        moved = (p.exp() * (p - q)).sum(-1).mean()
        print(f"dump: float8 moves the verifier's distribution by {moved:.2g} nats a token, over {len(p)} tokens")


def _unlike_logits(verifier: Verifier, last: Tensor, logits: Tensor) -> Tensor:
    """Return whether lm_head on the recorded state gives other logits than the model (bool [], on the state's device).

    Training builds its targets so. The model's own module multiplies: its matrix may be quantised or spread over ranks.
    """
    head = verifier.model.get_output_embeddings()
    again = logit_transform(verifier.model.config.get_text_config()).apply_(head(last).to(logits.device).float())
    bias = getattr(head, "bias", None)
    differs = (again - logits.float()).abs().amax() > _LOGITS_AGREE * logits.float().abs().amax()
    unlike = differs | ~logits.isfinite().all()
    return (unlike if bias is None else unlike | bias.any().to(unlike.device)).to(last.device)


def refuse_unlike(unlike: list[Tensor]) -> None:
    """Raise ValueError if one of `_unlike_logits` is true."""
    if unlike and torch.stack(unlike).any():
        raise ValueError(
            "the verifier's logits are not lm_head times its final normed state, nor that scaled or capped as "
            "fledge knows it: it cannot train from this verifier"
        )
