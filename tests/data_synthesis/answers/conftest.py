"""The verifier of the fault server, as a checkpoint."""

from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, save_byte_tokenizer
from servers import END

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def byte_verifier(tmp_path_factory) -> Path:
    """A random verifier whose tokens are bytes, as the fault server's."""
    folder = tmp_path_factory.mktemp("verifier")
    save_byte_tokenizer(folder, TEMPLATE)
    config = transformers.LlamaConfig(
        **SMALL_DECODER,
        vocab_size=END + 1,
        intermediate_size=64,
        max_position_embeddings=8192,
        eos_token_id=END,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
