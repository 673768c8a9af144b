"""Verifiers of many architectures: states are captured as transformers defines them, and decoding stays lossless."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import IMAGE_TEXT_MODELS, MODELS, SIZES, make_model, save_verifier
from fledge.conf.schema import Device, Dtype, VerifierConfig
from fledge.data_synthesis.states.transformers_engine import read_documents
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.speculator import Request, Speculator
from fledge.models.verifier.cache import CachedVerifier, Tree
from fledge.models.verifier.config import load_config, load_end_token_ids, logit_transform, warn_if_emulated
from fledge.models.verifier.model import Verifier, check_capture, load_final_norm
from fledge.models.verifier.weights import VerifierWeights, verifier_identity
from oracles import Oracle, TreeOracle
from safetensors.torch import load_file, save_file

RECURRENT = {"falcon h1": {}, "lfm2, final norm by another name": {"layer_types": ["conv", "full_attention"] * 4}}


@pytest.fixture(params=[*MODELS, *IMAGE_TEXT_MODELS])
def config(request, tmp_path, verifier) -> VerifierConfig:
    """A random model of another architecture, with the tiny verifier's tokenizer."""
    return save_verifier(make_model(request.param, verifier.model.config.vocab_size), verifier.tokenizer, tmp_path)


def test_captured_states_equal_output_hidden_states(config):
    verifier = Verifier.load(config)
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    output = verifier.forward(ids, use_cache=False)
    with torch.no_grad():
        states = verifier.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(output.aux_hidden_states, torch.cat([states[layer + 1] for layer in (1, 3, 4)], dim=-1))
    assert torch.equal(output.last_hidden_state, states[-1])
    again = logit_transform(load_config(config)).apply_(output.last_hidden_state @ VerifierWeights(config).lm_head().T)
    torch.testing.assert_close(again, output.logits, rtol=1e-5, atol=1e-5)
    check_capture(verifier, ids)
    assert [number for number, *_ in read_documents(verifier, list(ids), 80)] == [1, 0]


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_the_final_norm_alone_gives_the_last_state_of_the_last_layers_output(config, dtype):
    config.dtype = dtype
    verifier = Verifier.load(config, [SIZES["num_hidden_layers"] - 1])
    output = verifier.forward(torch.arange(1, 41)[None], use_cache=False)
    assert not torch.equal(output.aux_hidden_states, output.last_hidden_state)
    assert torch.equal(load_final_norm(config)(output.aux_hidden_states), output.last_hidden_state)


def test_a_layer_whose_output_is_not_the_hidden_state_is_named(tmp_path, verifier):
    config = save_verifier(make_model("llama", 600), verifier.tokenizer, tmp_path)
    changed = Verifier.load(config)
    # the next layer is given, and fledge sees, something else than what layer 3 puts out
    first = {"prepend": True, "with_kwargs": True}
    changed.model.model.layers[4].register_forward_pre_hook(lambda _, inputs, words: ((2 * inputs[0],), words), **first)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*layer 3 is not"):
        check_capture(changed, torch.arange(1, 12)[None])


def test_a_sharded_checkpoint_is_read_as_a_single_file_is(tmp_path, verifier):
    model = make_model("llama", 600)
    one, several = (
        save_verifier(model, verifier.tokenizer, tmp_path / size, max_shard_size=size) for size in ("1GB", "200KB")
    )
    assert len(list((tmp_path / "200KB").glob("*.safetensors"))) > 2
    for name in ("embedding", "lm_head"):
        assert torch.equal(getattr(VerifierWeights(one), name)(), getattr(VerifierWeights(several), name)())
    ids = torch.arange(1, 12)[None]
    outputs = [Verifier.load(config).forward(ids) for config in (one, several)]
    assert torch.equal(outputs[0].aux_hidden_states, outputs[1].aux_hidden_states)
    before = verifier_identity(several)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert (
        verifier_identity(save_verifier(model, verifier.tokenizer, tmp_path / "200KB", max_shard_size="200KB"))
        != before
    )


def test_an_untied_checkpoint_without_its_lm_head_is_refused(tmp_path, verifier):
    config = save_verifier(make_model("llama", 600), verifier.tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor \*\.lm_head\.weight.*fetch the verifier again"):
        VerifierWeights(config).lm_head()
    with pytest.raises(ValueError, match=r"finds no weights for lm_head\.weight"):
        Verifier.load(config)


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
    config = save_verifier(model, verifier.tokenizer, tmp_path)
    assert type(Verifier.load(config).model) is type(model)
    text, weights = load_config(config), VerifierWeights(config)
    assert (text.hidden_size, text.num_hidden_layers) == (SIZES["hidden_size"], SIZES["num_hidden_layers"])
    assert torch.equal(weights.embedding(), model.get_input_embeddings().weight)
    assert torch.equal(weights.lm_head(), model.get_output_embeddings().weight)
    decoder = getattr(model.get_decoder(), "model", model.get_decoder())
    assert torch.equal(weights.final_norm()["weight"], decoder.norm.weight)


@pytest.mark.parametrize("name", [name for name in (*MODELS, *IMAGE_TEXT_MODELS) if name != "falcon h1"])
def test_greedy_speculation_is_lossless(tmp_path, verifier, name):
    config = save_verifier(make_model(name, verifier.model.config.vocab_size), verifier.tokenizer, tmp_path)
    verifier = Verifier.load(config)
    prompts = [list(range(10, 40)), list(range(50, 70))]  # longer than the sliding window and the attention chunk
    expected = []
    for prompt in prompts:
        output = verifier.model.generate(
            torch.tensor([prompt]), max_new_tokens=50, do_sample=False, eos_token_id=verifier.end_token_ids
        )
        expected.append(output[0, len(prompt) :].tolist())
    drafters = [NoDraft(), Oracle(expected, 3, wrong=0.2), TreeOracle(expected, 11, 4, wrong=0.2)]
    speculator = Speculator(verifier, drafters, num_sequences=2)
    speculator.cached.check(prompts[0])
    speculator.prefill([Request(prompt, 50) for prompt in prompts])
    for drafter in drafters:
        answers = speculator.decode(drafter)
        assert [answer.tokens for answer in answers] == expected
        assert max(map(len, expected)) < 10 or drafter.depth == 0 or sum(answers[0].accepted + answers[1].accepted) > 10


@pytest.mark.parametrize("name", RECURRENT)
def test_a_verifier_with_a_state_that_cannot_be_taken_back_is_refused(tmp_path, verifier, name):
    model = make_model(name, verifier.model.config.vocab_size, **RECURRENT[name])
    config = save_verifier(model, verifier.tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"a rejected draft cannot be taken out of .*evaluate\.engine=server"):
        Speculator(Verifier.load(config), [])


def test_queries_of_llama_4_are_scaled_by_their_place_in_the_text(tmp_path, verifier):
    """Layers without rotary embedding scale by position, here from the fourth token on."""
    more = {"floor_scale": 4, "attn_scale": 0.5, "no_rope_layers": [1, 0] * 4}
    model = make_model("llama 4 text", verifier.model.config.vocab_size, **more)
    verifier = Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path))
    prompts = [list(range(10, 31)), list(range(40, 47))]
    expected = [verifier.forward(torch.tensor([[*prompt, 99, 98]])).logits[0, -1] for prompt in prompts]
    cached = CachedVerifier(verifier, 2)
    cached.reserve(64)
    for place, prompt in enumerate(prompts):
        cached.forward(torch.tensor([prompt]), torch.tensor([0]), 64, slice(place, place + 1))
    ancestors = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]]).bool().expand(2, -1, -1)
    tree = Tree(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 1, 1]] * 2), ancestors, 1)
    found = cached.forward(torch.tensor([[99, 97, 96, 98]] * 2), torch.tensor([21, 7]), 64, tree=tree)
    for place in range(2):
        torch.testing.assert_close(found.logits[place, 3], expected[place], rtol=1e-4, atol=1e-4)


def test_a_hub_verifier_that_was_fetched_before_is_read_without_network(tmp_path, tiny_verifier_folder):
    repository = tmp_path / "hub" / "models--some--verifier"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_verifier_folder, repository / "snapshots" / ("0" * 40))
    script = (
        "from fledge.conf.schema import Device, Dtype, VerifierConfig\n"
        "from fledge.models.verifier.model import Verifier\n"
        "from fledge.models.verifier.weights import VerifierWeights\n"
        "config = VerifierConfig('some/verifier', dtype=Dtype.float32, device=Device.cpu)\n"
        "Verifier.load(config)\n"
        "print(VerifierWeights(config).lm_head().shape)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([600, 64])" in done.stdout


def test_an_adapter_without_its_model_is_told_from_a_missing_model(tmp_path, tiny_verifier_folder):
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_verifier_folder, adapter, ignore=shutil.ignore_patterns("config.json", "model*"))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = VerifierConfig(str(adapter), dtype=Dtype.float32, device=Device.cpu)
    for reads in (Verifier.load, VerifierWeights, verifier_identity):
        with pytest.raises(ValueError, match=r"is a PEFT adapter, not a model: give it as verifier\.adapter"):
            reads(config)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="Unrecognized model"):
        Verifier.load(config)


def test_bfloat16_on_a_cpu_without_instructions_for_it_is_warned_of(verifier_config, caplog):
    cpu, has = torch.device("cpu"), torch.ops.mkldnn._is_mkldnn_bf16_supported()
    warn_if_emulated("train.dtype", Dtype.float32, cpu)
    warn_if_emulated("train.dtype", Dtype.bfloat16, torch.device("cuda"))
    assert not caplog.messages
    verifier_config = dataclasses.replace(verifier_config, dtype=Dtype.bfloat16)
    Verifier.load(verifier_config)
    assert [message.split("=")[0] for message in caplog.messages] == ([] if has else ["verifier.dtype"])
