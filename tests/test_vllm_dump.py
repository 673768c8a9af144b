"""vLLM as the engine of a dump: its states are the transformers engine's. Those with vLLM run by `make test-serving`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION
from fledge.conf.schema import Config, Device, Dtype, DumpConfig, VerifierConfig
from fledge.data_synthesis.record import TransformersEngine
from fledge.data_synthesis.store import Sample
from fledge.data_synthesis.vllm_engine import VllmEngine, last_words, worker_environment
from fledge.models.verifier import Verifier

LENGTHS = (17, 1, 900, 2, 300)
AUX_LAYERS = [1, 3, 7]  # and the last layer, whose output is also the last state before its norm
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration")


def random_verifier(architecture: str, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> VerifierConfig:
    """Save a small model of the class, as it is initialised, but for norms that do something."""
    sizes = {
        **SMALL_DECODER,
        **(SMALL_LLAMA4 if "Llama4" in architecture else {"intermediate_size": 128}),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model_class = getattr(transformers, architecture)
    if model_class.config_class is transformers.Llama4Config:
        config = transformers.Llama4Config(
            text_config={**sizes, "attention_chunk_size": 512}, vision_config=SMALL_VISION
        )
    else:
        config = model_class.config_class(**sizes)
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return VerifierConfig(path=str(folder), dtype=Dtype.float32, device=Device.cpu)


def samples_of(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocab_size, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [Sample(str(i), ids, torch.ones_like(ids, dtype=torch.uint8)) for i, ids in enumerate(sequences)]


def configure(folder: Path, verifier: VerifierConfig, python: str | None = None, **options: object) -> Config:
    dump = DumpConfig(max_length=1000, batch_tokens=1024, vllm_python=python, vllm_options=options)
    return Config(name="run", runs_dir=str(folder), verifier=verifier, dump=dump)


@pytest.mark.serving
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllms_states_are_the_transformers_engines(tmp_path, verifier, architecture):
    config = random_verifier(architecture, verifier.tokenizer, tmp_path / "verifier")
    samples = samples_of(len(verifier.tokenizer))
    expected = {n: states for n, *states in TransformersEngine(Verifier.load(config, AUX_LAYERS), 1024).read(samples)}
    images = {"limit_mm_per_prompt": {"image": 0}} if architecture.endswith("ForConditionalGeneration") else {}
    engine = VllmEngine(configure(tmp_path, config, os.environ["FLEDGE_VLLM_PYTHON"], **images), AUX_LAYERS)
    try:
        for _ in range(2):
            got = {number: states for number, *states in engine.read(samples)}
            assert got.keys() == expected.keys()
            for number, states in got.items():
                for ours, theirs in zip(states, expected[number], strict=True):
                    print(
                        architecture, LENGTHS[number], f"{(ours - theirs).abs().max():.1e} of {theirs.abs().max():.1f}"
                    )
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-5)
            assert not list(engine._folder.iterdir()), "files of states are deleted as soon as they are read"
    finally:
        engine.close()
    assert not engine._folder.exists()
