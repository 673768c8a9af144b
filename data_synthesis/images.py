"""The images of conversations: which there are, and their pixels."""

from __future__ import annotations

import io
import re
from collections import abc
from pathlib import Path
from typing import Any
from urllib.request import Request, url2pathname, urlopen

from PIL import Image, ImageOps, UnidentifiedImageError

from .chat import Message, NoExactSpanError
from .prompts import images_of

TIMEOUT_S = 30.0  # of fetching an image
_SHOWN = 200  # characters of an address in messages


class UnreadableImagesError(NoExactSpanError):
    """The verifier cannot be given the images of a conversation."""


def conversation_images(messages: abc.Iterable[Message]) -> list[str]:
    """Give the addresses of a conversation's images, in their order."""
    return [address for message in messages for address in images_of(message["content"])]


def images_before_answers(messages: abc.Iterable[Message]) -> list[int]:
    """Give how many images the verifier had been shown at each of its answers."""
    shown, counts = 0, []
    for message in messages:
        shown += len(images_of(message["content"]))
        if message["role"] == "assistant":
            counts.append(shown)
    return counts


def template_messages(messages: abc.Iterable[Message]) -> list[Message]:
    """Give messages as chat templates of models that take images want them: `{"type": "image"}` for each."""
    return [message | {"content": _template_content(message["content"])} for message in messages]


def _template_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    kinds = {"text": lambda part: {"type": "text", "text": part["text"]}, "image_url": lambda _: {"type": "image"}}
    for part in content:
        if part["type"] not in kinds:
            raise UnreadableImagesError(f"it has a content part of type {part['type']}, which is not read")
    return [kinds[part["type"]](part) for part in content]


def load_image(address: str) -> Image.Image:
    """Load an image as vLLM does: upright, and over white where it is transparent.

    Args:
        address: `http:`, `https:`, `data:` or `file:` URL, or a path, which is relative to the working directory.
    """
    content = _read(address)
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("it is no image of a format that Pillow reads") from None
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(clear, mask=clear.getchannel("A"))
    return image.convert("RGB")


def _read(address: str) -> bytes:
    if address.startswith("file://"):
        return Path(url2pathname(address.removeprefix("file://").removeprefix("localhost"))).read_bytes()
    if not re.match("(https?|data):", address):
        return Path(address).read_bytes()
    with urlopen(Request(address, headers={"User-Agent": "fledge"}), timeout=TIMEOUT_S) as response:
        return bytes(response.read())


def load_images(addresses: abc.Sequence[str]) -> list[Image.Image]:
    """Load the images of a conversation.

    Raises:
        UnreadableImagesError: names the first that is missing or broken.
    """
    images = []
    for number, address in enumerate(addresses, 1):
        try:
            images.append(load_image(address))
        except Exception as error:  # what is broken breaks decoders in all their ways
            reason = " ".join(f"{type(error).__name__}: {error}".split()).replace(address, "it")
            shown = address[:_SHOWN] + "..." * (len(address) > _SHOWN)
            raise UnreadableImagesError(f"image {number} ({shown}) cannot be read: {reason[:200]}") from None
    return images
