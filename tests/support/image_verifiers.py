"""Small verifiers that take images, images for them, and conversations about these."""

import base64
from pathlib import Path

import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION
from fledge.conf.schema import Device, Dtype, VerifierConfig
from PIL import Image

LLAMA4_TOKENS = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>")
LLAMA4_TOKENS += ("<|tile_x_separator|>", "<|tile_y_separator|>")
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' }}
{%- if m.content is string %}{{ m.content }}{% else %}
  {%- for part in m.content %}{% if part.type == 'image' %}{{ 'IMAGE' }}{% else %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"""


def make_tokenizer(like, tokens, image):
    tokenizer = transformers.AutoTokenizer.from_pretrained(like)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", image)
    return tokenizer


def save_llama4(folder, like, chunk=16):
    """A random Llama 4 that takes images, tiles of 56 x 56 pixels in 4 patches, and its processor."""
    tokenizer = make_tokenizer(like, LLAMA4_TOKENS, "<|image|>")
    text = {**SMALL_DECODER, **SMALL_LLAMA4, "attention_chunk_size": chunk, "vocab_size": len(tokenizer)}
    config = transformers.Llama4Config(
        text_config={**text, "max_position_embeddings": 512, "tie_word_embeddings": False},
        vision_config={**SMALL_VISION, "image_size": 56},
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    images = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    processor = transformers.Llama4Processor(images, tokenizer, chat_template=tokenizer.chat_template)
    return save(folder, transformers.Llama4ForConditionalGeneration, config, processor)


def save_qwen3_vl(folder, like):
    """A random Qwen3-VL, whose vision tower adds to the states of the first two layers too, and its processor."""
    tokenizer = make_tokenizer(like, QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    text = {**SMALL_DECODER, "intermediate_size": 128, "rope_parameters": rope, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 1, "intermediate_size": 64, "out_hidden_size": 64}
    named = ("vision_start", "vision_end", "image", "video")
    config = transformers.Qwen3VLConfig(
        text_config={**text, "tie_word_embeddings": False},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        **{f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in zip(named, QWEN_TOKENS, strict=True)},
    )
    images = transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=128 * 128)
    video = transformers.Qwen3VLVideoProcessor()
    processor = transformers.Qwen3VLProcessor(images, tokenizer, video, chat_template=tokenizer.chat_template)
    return save(folder, transformers.Qwen3VLForConditionalGeneration, config, processor)


def save(folder, model_class, config, processor) -> VerifierConfig:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # so that what the pixels say is heard
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return VerifierConfig(path=str(folder), dtype=Dtype.float32, device=Device.cpu)


def make_pictures(folder):
    """Five images: small, wide (two tiles), tall, large (four tiles and a whole), and small again."""
    paths = []
    for number, (width, height) in enumerate([(40, 40), (110, 50), (50, 130), (200, 180), (56, 56)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    return paths


def data_url(path, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def part(address):
    return {"type": "image_url", "image_url": {"url": address}}


def conversation(*turns, **changes):
    """A record of the texts and content parts that user and assistant say in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
    return {"id": "s/1", "messages": messages, "finish_reasons": ["stop"] * (len(turns) // 2), **changes}


def asked(*addresses, text="What is it?"):
    return [*map(part, addresses), {"type": "text", "text": text}]
