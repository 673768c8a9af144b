"""Images as the verifier reads them: placeholder tokens in its text, pixels beside it.

What the processor writes for an image stands in `input_ids`, so that the draft head is fed the embedding of these
tokens at image positions, as vLLM feeds it; the verifier itself reads the pixels there.
"""

from __future__ import annotations

import itertools
from collections import abc
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...conf.schema import VerifierConfig
from ...models.verifier.config import load_whole_config, takes_images
from ...models.verifier.model import PER_TOKEN
from ...models.verifier.processor import load_processor
from .chat_template import Message, NoExactSpanError, PlacedImage, Sequence
from .images import UnreadableImagesError, load_images


@dataclass(frozen=True)
class Images:
    """Images in the order in which the verifier reads them, and what its processor makes of them."""

    addresses: tuple[str, ...]
    digests: tuple[str, ...]  # of the pixels of each
    placeholder: str  # what a chat template writes for an image
    placeholder_id: int
    texts: list[str]  # what the processor writes instead, for each
    tokens: list[list[int]]  # the same in tokens
    marks: frozenset[int]  # the special ones of these
    model_inputs: dict[str, Tensor]  # pixels, and whatever else the model takes with them

    def expand_text(self, text: str) -> str:
        """Write a text with what the processor writes for its placeholders: those of the first images."""
        first, *others = text.split(self.placeholder)
        return first + "".join(made + other for made, other in zip(self.texts, others, strict=False))

    def find(self, token_ids: list[int], number: int) -> list[tuple[int, int]] | None:
        """Find the first `number` images in tokens, as spans [start, end); None: other images, or not just these."""
        spans: list[tuple[int, int]] = []
        place = 0
        for tokens in self.tokens[:number]:
            place = _index(token_ids, tokens, place)
            if place < 0:
                return None
            spans.append((place, place + len(tokens)))
            place += len(tokens)
        inside = sum(token in self.marks for tokens in self.tokens[:number] for token in tokens)
        return spans if sum(token in self.marks for token in token_ids) == inside else None

    def place(self, sequence: Sequence, number: int) -> Sequence:
        """Give a sequence with its images, the first `number`, placeholders expanded where they were not.

        With one image of the tokens `[ p p ]`:

            tokens     u  <image>  v | A <eot>        u  [  p  p  ]  v | A <eot>
            answers                   [3,   5)                          [6,   8)

        Raises:
            NoExactSpanError: its tokens are not those of these images, or an answer holds some of an image.
        """
        spans = self.find(sequence.token_ids, number)
        if spans is None:
            sequence = self._expanded(sequence, number)
            spans = self.find(sequence.token_ids, number)
        if spans is None:
            raise NoExactSpanError(f"its tokens are not those that the processor writes for its {number} images")
        if any(start < last and first < end for start, end in sequence.answers for first, last in spans):
            raise NoExactSpanError("an answer holds tokens of an image")
        placed = zip(self.addresses, spans, self.digests, strict=False)
        return replace(sequence, images=tuple(PlacedImage(*image) for image in placed))

    def _expanded(self, sequence: Sequence, number: int) -> Sequence:
        places = [place for place, token in enumerate(sequence.token_ids) if token == self.placeholder_id]
        if len(places) != number or any({tokens[0], tokens[-1]} - self.marks for tokens in self.tokens[:number]):
            return sequence
        token_ids: list[int] = []
        for start, place, tokens in zip([-1, *places], places, self.tokens, strict=False):
            token_ids += sequence.token_ids[start + 1 : place] + tokens
        token_ids += sequence.token_ids[places[-1] + 1 :] if places else sequence.token_ids
        grown = [len(tokens) - 1 for tokens in self.tokens]

        def moved(border: int) -> int:
            return border + sum(grow for place, grow in zip(places, grown, strict=False) if place < border)

        return Sequence(token_ids, [(moved(start), moved(end)) for start, end in sequence.answers])


def _index(tokens: list[int], wanted: list[int], start: int) -> int:
    """Give where a run of tokens begins, from `start` on; -1: nowhere."""
    places = range(start, len(tokens) - len(wanted) + 1)
    return next((i for i in places if tokens[i] == wanted[0] and tokens[i : i + len(wanted)] == wanted), -1)


class ImageTokenizer:
    """The verifier's tokenizer for one conversation: a placeholder becomes what the processor makes of its image."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, images: Images) -> None:
        self._tokenizer, self._images = tokenizer, images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokenise a text whose placeholders are those of the first images."""
        return self._tokenizer.encode(self._images.expand_text(text), add_special_tokens=add_special_tokens)

    def apply_chat_template(self, messages: list[Message], tokenize: bool = True, **options: Any) -> Any:
        """Render messages, which must write a placeholder for each of their images, as text or in tokens."""
        text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        parts = itertools.chain(*(m["content"] for m in messages if isinstance(m["content"], list)))
        wanted = sum(part["type"] == "image" for part in parts)
        found = text.count(self._images.placeholder)
        if found != wanted:
            raise NoExactSpanError(f"it is rendered with {found} of {self._images.placeholder} for {wanted} images")
        return self.encode(text) if tokenize else text


class ImageReader:
    """Reads images as one verifier does, whose processor is loaded at the first.

    Args:
        max_images: of a conversation.
        local: fetch images from hosts of this machine's network too (data.local_images).
    """

    def __init__(self, config: VerifierConfig, max_images: int = 5, local: bool = False) -> None:
        self._config, self._max_images, self._local = config, max_images, local

    @cached_property
    def _processor(self) -> ProcessorMixin | None:
        return load_processor(self._config) if takes_images(load_whole_config(self._config)) else None

    def read(self, addresses: abc.Sequence[str], text: str | None = None) -> Images:
        """Load images and let the processor make of them what the verifier reads.

        Args:
            text: the rendered conversation that they are in, which is made sure to become the processor's own tokens.

        Raises:
            UnreadableImagesError: the verifier takes no images or fewer, or one is missing or broken.
            ValueError: the verifier's processor is missing, or does not tell what it writes for an image.
        """
        processor: Any = self._processor
        if processor is None:
            raise UnreadableImagesError("it has images, which the verifier does not take")
        if len(addresses) > self._max_images:
            raise UnreadableImagesError(f"it has {len(addresses)} images, more than dump.max_images={self._max_images}")
        if text is None:
            text = processor.image_token * len(addresses)
        if text.count(processor.image_token) != len(addresses):
            found = text.count(processor.image_token)
            raise NoExactSpanError(
                f"it is rendered with {found} of {processor.image_token} for {len(addresses)} images"
            )
        loaded = load_images(addresses, self._local)
        try:
            made = dict(
                processor(
                    text=[text],
                    images=loaded,
                    add_special_tokens=False,
                    return_tensors="pt",
                    return_text_replacement_offsets=True,
                )
            )
        except ValueError as error:
            raise UnreadableImagesError(f"the processor refuses its images: {error}") from None
        digests = tuple(xxhash.xxh3_64_hexdigest(image.tobytes()) for image in loaded)
        return self._images(tuple(addresses), digests, text, made)

    def _images(self, addresses: tuple[str, ...], digests: tuple[str, ...], text: str, made: dict[str, Any]) -> Images:
        processor: Any = self._processor
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        (written,) = made.pop("text_replacement_offsets", None) or ((),)
        texts = [str(piece["replacement"]) for piece in written]
        if len(texts) != len(addresses):
            raise ValueError(
                f"verifier.path {self._config.path!r}: its {type(processor).__name__} does not tell what it writes "
                "for an image, so conversations with images cannot be dumped"
            )
        tokens = [tokenizer.encode(piece.strip(), add_special_tokens=False) for piece in texts]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        images = Images(
            addresses,
            digests,
            processor.image_token,
            processor.image_token_id,
            texts,
            tokens,
            frozenset(token for run in tokens for token in run if token in special),
            {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")},
        )
        expected = made["input_ids"][0].tolist()
        if tokenizer.encode(images.expand_text(text), add_special_tokens=False) != expected:
            raise NoExactSpanError("its processor writes other tokens than those of its text and images")
        return images

    def model_inputs(
        self, input_ids: Tensor, images: Images, digests: abc.Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Give what the model takes besides a sequence's tokens [T] (a batch of one): pixels, and what goes with them.

        Args:
            digests: of the images that the tokens were made with, where they are known.

        Raises:
            UnreadableImagesError: an image is not the one that the tokens were made with.
        """
        token_ids = input_ids.tolist()
        exchanged = digests is not None and list(digests) != list(images.digests)
        if exchanged or images.find(token_ids, len(images.addresses)) is None:
            raise UnreadableImagesError("its images are not those that its tokens were made with")
        inputs, processor = images.model_inputs, self._processor
        assert processor is not None
        kinds = {name: processor.create_mm_token_type_ids([token_ids]) for name in PER_TOKEN if name in inputs}
        return {**inputs, **{name: torch.tensor(value) for name, value in kinds.items()}}
