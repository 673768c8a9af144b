"""Images as the verifier reads them: placeholder tokens in its text, pixels next to it.

What the processor writes for an image stands in `input_ids`, so that the draft head is fed the embedding of these
tokens at image positions, as vLLM feeds it; the verifier itself reads the pixels there.
"""

import itertools
from collections import abc
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
        """Return the spans [start, end) of the first `number` images; None: other images, or not just these."""
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
        """Return a sequence with its images, the first `number`; placeholders that were not expanded are.

        With one image of the tokens `[ p p ]`:

            tokens     u  <image>  v | A <eot>        u  [  p  p  ]  v | A <eot>
            answers                   [3,   5)                          [6,   8)

        Raises NoExactSpanError if its tokens are not those of these images, or an answer holds some of an image.
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
        made = dict(zip(places, self.tokens, strict=False))
        pieces = [made.get(place, [token]) for place, token in enumerate(sequence.token_ids)]
        borders = list(itertools.accumulate(map(len, pieces), initial=0))  # where each token begins now, and the end
        token_ids = list(itertools.chain.from_iterable(pieces))
        return Sequence(token_ids, [(borders[start], borders[end]) for start, end in sequence.answers])


def _index(tokens: list[int], run: list[int], start: int) -> int:
    """Return where a run of tokens begins, from `start` on; -1: nowhere."""
    places = range(start, len(tokens) - len(run) + 1)
    return next((i for i in places if tokens[i] == run[0] and tokens[i : i + len(run)] == run), -1)


def _check_placeholders(text: str, placeholder: str, number: int) -> None:
    if (found := text.count(placeholder)) != number:
        raise NoExactSpanError(f"it is rendered with {found} of {placeholder} for {number} images")


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
        _check_placeholders(text, self._images.placeholder, sum(part["type"] == "image" for part in parts))
        return self.encode(text) if tokenize else text


class ImageReader:
    """Reads images as one verifier does, whose processor is loaded at the first.

    A conversation may have `max_images`; `local` fetches from hosts of this machine's network too (data.local_images).
    """

    def __init__(self, config: VerifierConfig, max_images: int = 5, local: bool = False) -> None:
        self._config, self._max_images, self._local = config, max_images, local

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self._config) if takes_images(load_whole_config(self._config)) else None

    def read(self, addresses: abc.Sequence[str], text: str | None = None) -> Images:
        """Load images and let the processor make of them what the verifier reads.

        `text` is the rendered conversation that they are in; it must become the processor's own tokens.

        Raises:
            UnreadableImagesError: the verifier takes no images or fewer, or one is missing or broken.
            ValueError: the verifier's processor is missing, or does not tell what it writes for an image.
        """
        processor = self._processor
        if processor is None:
            raise UnreadableImagesError("it has images, which the verifier does not take")
        if len(addresses) > self._max_images:
            raise UnreadableImagesError(f"it has {len(addresses)} images, more than dump.max_images={self._max_images}")
        text = processor.image_token * len(addresses) if text is None else text
        _check_placeholders(text, processor.image_token, len(addresses))
        loaded = load_images(addresses, self._local)
        options = {"add_special_tokens": False, "return_tensors": "pt", "return_text_replacement_offsets": True}
        try:
            made = dict(processor(text=[text], images=loaded, **options))
        except ValueError as error:
            raise UnreadableImagesError(f"the processor refuses its images: {error}") from None
        (written,) = made.pop("text_replacement_offsets", None) or ((),)
        texts = [str(piece["replacement"]) for piece in written]
        if len(texts) != len(addresses):
            raise ValueError(
                f"verifier.path {self._config.path!r}: its {type(processor).__name__} does not tell what it writes "
                "for an image, so conversations with images cannot be dumped"
            )
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        tokens = [tokenizer.encode(piece.strip(), add_special_tokens=False) for piece in texts]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        images = Images(
            addresses=tuple(addresses),
            digests=tuple(xxhash.xxh3_64_hexdigest(image.tobytes()) for image in loaded),
            placeholder=processor.image_token,
            placeholder_id=processor.image_token_id,
            texts=texts,
            tokens=tokens,
            marks=frozenset(itertools.chain(*tokens)) & special,
            model_inputs={name: made[name] for name in made if name not in ("input_ids", "attention_mask")},
        )
        if tokenizer.encode(images.expand_text(text), add_special_tokens=False) != made["input_ids"][0].tolist():
            raise NoExactSpanError("its processor writes other tokens than those of its text and images")
        return images

    def model_inputs(
        self, input_ids: Tensor, images: Images, digests: abc.Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return what the model takes besides the tokens [T] of a sequence (a batch of one): pixels and their like.

        Raises UnreadableImagesError if an image is not the one that the tokens were made with, by its digest if known.
        """
        token_ids = input_ids.tolist()
        exchanged = digests is not None and list(digests) != list(images.digests)
        if exchanged or images.find(token_ids, len(images.addresses)) is None:
            raise UnreadableImagesError("its images are not those that its tokens were made with")
        names = [name for name in PER_TOKEN if name in images.model_inputs]
        kinds = {name: torch.tensor(self._processor.create_mm_token_type_ids([token_ids])) for name in names}
        return images.model_inputs | kinds
