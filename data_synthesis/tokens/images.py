"""The images of conversations: which there are, and their pixels."""

import io
from collections import abc
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..prompts.addresses import read_address
from ..prompts.rows import images_of
from .chat_template import Message, NoExactSpanError

_SHOWN = 200  # characters of an address in messages


class UnreadableImagesError(NoExactSpanError):
    """The verifier cannot be given the images of a conversation."""


def conversation_images(messages: abc.Iterable[Message]) -> list[str]:
    """Return the addresses of a conversation's images, in their order."""
    return [address for message in messages for address in images_of(message["content"])]


def images_before_answers(messages: abc.Sequence[Message]) -> list[int]:
    """Return how many images the verifier had been shown at each of its answers."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [len(conversation_images(messages[:place])) for place in answers]


def template_messages(messages: abc.Iterable[Message]) -> list[Message]:
    """Return messages as chat templates of models that take images want them: `{"type": "image"}` for each."""
    return [message | {"content": _template_content(message["content"])} for message in messages]


def _template_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    kinds = {"text": lambda part: {"type": "text", "text": part["text"]}, "image_url": lambda _: {"type": "image"}}
    for part in content:
        if part["type"] not in kinds:
            raise UnreadableImagesError(f"it has a content part of type {part['type']}, which is not read")
    return [kinds[part["type"]](part) for part in content]


def load_image(address: str, local: bool = False) -> Image.Image:
    """Load an image as vLLM does: upright, and over white if it is transparent.

    The address is a `http:`, `https:`, `data:` or `file:` URL, or a path relative to the working directory; `local`
    takes hosts of this machine's network too.
    """
    content = read_address(address, local)
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


def load_images(addresses: abc.Sequence[str], local: bool = False) -> list[Image.Image]:
    """Load the images of a conversation; UnreadableImagesError names the first that is missing or broken."""
    images = []
    for number, address in enumerate(addresses, 1):
        try:
            images.append(load_image(address, local))
        except Exception as error:  # what is broken breaks decoders in all their ways
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split()).replace(repr(address), "it").replace(address, "it")
            shown = address[:_SHOWN] + "..." * (len(address) > _SHOWN)
            raise UnreadableImagesError(f"image {number} ({shown}) cannot be read: {reason[:200]}") from None
    return images
