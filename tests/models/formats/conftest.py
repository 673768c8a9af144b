"""A verifier that fits the small heads, and a configuration that names it."""

from pathlib import Path

import pytest
import torch
from fledge.conf.schema import (
    Config,
    Device,
    Dtype,
    VerifierConfig,
)
from make_embedded import CHAT_TEMPLATE
from published_heads import SHAPE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def small_verifier(tmp_path_factory) -> Path:
    """An untrained verifier that fits `make_head`."""
    folder = tmp_path_factory.mktemp("verifier")
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, small_verifier) -> Config:
    verifier = VerifierConfig(path=str(small_verifier), dtype=Dtype.float32, device=Device.cpu)
    return Config(name="run", runs_dir=str(tmp_path / "runs"), verifier=verifier)
