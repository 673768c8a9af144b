"""Verifiers of other architectures: states are captured as transformers defines them, and decoding stays lossless."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION
from fledge.conf.schema import Device, DraftConfig, Dtype, VerifierConfig
from fledge.eval.draft_decoder import DraftDecoder
from fledge.eval.prompt_lookup import NoDraft
from fledge.eval.speculative import speculate
from fledge.models.draft_head import DraftHead, DraftHeadConfig, initialise
from fledge.models.verifier import Verifier, VerifierWeights, load_config, load_end_token_ids, logit_transform
from fledge.models.vocabulary import build_vocabulary

SIZES = {
    **SMALL_DECODER,
    "max_position_embeddings": 256,
}
MODELS = {
    "qwen3": ("Qwen3", {"intermediate_size": 128}),
    "mistral, sliding window": ("Mistral", {"intermediate_size": 128, "sliding_window": 16}),
    "llama, tied embedding": ("Llama", {"intermediate_size": 128, "tie_word_embeddings": True}),
    "llama 4 text": (
        "Llama4",
        {
            **SMALL_LLAMA4,
            "attention_chunk_size": 16,
        },
    ),
}


IMAGE_TEXT_MODELS = {
    "llama 4": ("Llama4", MODELS["llama 4 text"][1], SMALL_VISION),
    "qwen3 vl": (
        "Qwen3VL",
        {
            "intermediate_size": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        },
        {
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 1,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
}


def make_model(name: str, vocab_size: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if name in IMAGE_TEXT_MODELS:
        family, changes, vision = IMAGE_TEXT_MODELS[name]
        text = {"tie_word_embeddings": False, **SIZES, **changes, "vocab_size": vocab_size}
        whole = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
        return getattr(transformers, f"{family}ForConditionalGeneration")(whole)
    family, changes = MODELS[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Llama4" else f"{family}Config")
    values = {"tie_word_embeddings": False, **SIZES, **changes, "vocab_size": vocab_size}
    return getattr(transformers, f"{family}ForCausalLM")(config_class(**values))


@pytest.fixture(params=[*MODELS, *IMAGE_TEXT_MODELS])
def config(request, tmp_path, verifier) -> VerifierConfig:
    """A random model of another architecture, with the tiny verifier's tokenizer."""
    make_model(request.param, verifier.model.config.vocab_size).save_pretrained(tmp_path)
    verifier.tokenizer.save_pretrained(tmp_path)
    return VerifierConfig(path=str(tmp_path), dtype=Dtype.float32, device=Device.cpu)


def test_captured_states_equal_output_hidden_states(config):
    verifier = Verifier.load(config)
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    output = verifier.forward(ids, use_cache=False)
    with torch.no_grad():
        states = verifier.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(output.aux_hidden_states, torch.cat([states[layer + 1] for layer in (1, 3, 4)], dim=-1))
    assert torch.equal(output.last_hidden_state, states[-1])
    again = output.last_hidden_state @ VerifierWeights(config).lm_head().T
    torch.testing.assert_close(again, output.logits, rtol=1e-4, atol=1e-4)


def test_end_tokens_are_known_without_the_weights(config):
    generation, whole = (Path(config.path) / name for name in ("generation_config.json", "config.json"))
    whole.write_text(json.dumps({**json.loads(whole.read_text()), "eos_token_id": [7, 11]}))
    generation.write_text(json.dumps({"eos_token_id": 5}))
    for expected in ({5}, {7, 11}):
        verifier = Verifier.load(config)
        assert load_end_token_ids(config, verifier.tokenizer) == verifier.end_token_ids
        assert expected <= set(verifier.end_token_ids)
        generation.unlink(missing_ok=True)


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_a_model_that_takes_images_is_loaded_whole_and_its_text_decoder_is_read(tmp_path, verifier, name):
    model = make_model(name, verifier.model.config.vocab_size)
    decoder = getattr(model.get_decoder(), "model", model.get_decoder())
    torch.nn.init.normal_(decoder.norm.weight)
    model.save_pretrained(tmp_path)
    verifier.tokenizer.save_pretrained(tmp_path)
    config = VerifierConfig(path=str(tmp_path), dtype=Dtype.float32, device=Device.cpu)
    assert type(Verifier.load(config).model) is type(model)
    text, weights = load_config(config), VerifierWeights(config)
    assert (text.hidden_size, text.num_hidden_layers) == (SIZES["hidden_size"], SIZES["num_hidden_layers"])
    assert torch.equal(weights.embedding(), model.get_input_embeddings().weight)
    assert torch.equal(weights.lm_head(), model.get_output_embeddings().weight)
    assert torch.equal(weights.read(VerifierWeights.FINAL_NORM), decoder.norm.weight)


def test_greedy_speculation_is_lossless(config):
    verifier = Verifier.load(config)
    weights = VerifierWeights(config)
    shape = DraftHeadConfig.from_verifier(DraftConfig(vocab_size=300), load_config(config))
    head = DraftHead(shape, build_vocabulary(torch.ones(shape.vocab_size, dtype=torch.int64), 300))
    initialise(head, weights.embedding(), weights.lm_head(), 0)
    prompt = list(range(10, 40))  # longer than the sliding window and the attention chunk
    alone = speculate(verifier, NoDraft(), prompt, num_draft_tokens=3, max_tokens=50)
    drafted = speculate(verifier, DraftDecoder(head, weights.embedding()), prompt, num_draft_tokens=3, max_tokens=50)
    assert drafted.tokens == alone.tokens
    with torch.no_grad():
        expected = verifier.model.generate(
            torch.tensor([prompt]), max_new_tokens=50, do_sample=False, eos_token_id=verifier.end_token_ids
        )
    assert alone.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Gemma2", {"final_logit_softcapping": 0.5, "tie_word_embeddings": True}),
        ("FalconH1", {"lm_head_multiplier": 3.0, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32}),
    ],
)
def test_logits_are_lm_head_times_the_last_state_as_the_verifier_transforms_them(family, changes):
    torch.manual_seed(0)
    values = {"tie_word_embeddings": False, **SIZES, "intermediate_size": 128, "vocab_size": 100, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{**values, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        states = model.model(torch.arange(1, 12)[None]).last_hidden_state
        expected = model(torch.arange(1, 12)[None]).logits
        found = logit_transform(config).apply_(states @ model.get_output_embeddings().weight.T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
