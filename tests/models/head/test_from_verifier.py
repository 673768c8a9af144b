"""A head that begins as parts of its verifier."""

from dataclasses import replace

import pytest
import torch
from fledge.conf.schema import Config, DraftConfig, HeadInit, TrainConfig, validate
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.head.from_verifier import parameters_of_verifier
from fledge.models.head.ttt_attention import TTTAttention
from fledge.models.verifier.config import load_config
from fledge.models.verifier.weights import VerifierWeights
from transformers import AutoModelForCausalLM


def make(verifier_config, **draft) -> DraftHead:
    config = DraftHeadConfig.from_verifier(DraftConfig(vocab_size=None, **draft), load_config(verifier_config))
    head, weights = DraftHead(config), VerifierWeights(verifier_config)
    initialise(head, weights.embedding(), weights.lm_head(), seed=0)
    return head


@pytest.mark.parametrize(("num_layers", "aux_layers", "first"), [(1, [6], None), (3, [1, 4, 6], 5), (2, [0, 2], 3)])
def test_a_head_that_goes_on_where_an_aux_state_ends_has_the_verifiers_own_states(
    verifier_config, num_layers, aux_layers, first
):
    head = make(verifier_config, num_layers=num_layers, aux_layers=aux_layers, fc_norm=False)
    train = TrainConfig(init=HeadInit.layers, init_layer=first)
    head.load_state_dict(parameters_of_verifier(head, verifier_config, train), strict=False)
    model = AutoModelForCausalLM.from_pretrained(verifier_config.path, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.model(ids, output_hidden_states=True)
        states = output.hidden_states  # [layer + 1] is the output of a layer, but for the last, which is normed
        aux, embedding = torch.cat([states[layer + 1][0] for layer in aux_layers], -1), states[0][0].roll(-1, 0)
        attention = TTTAttention([12], num_layers)
        _, normed = head.step(embedding, head.fuse(aux), head.rotary(torch.arange(12), aux), attention)
        after = (model.config.num_hidden_layers if first is None else first + num_layers) - 1
        last = after == model.config.num_hidden_layers - 1
        expected = output.last_hidden_state if last else model.model.norm(states[after + 1])
    torch.testing.assert_close(normed, expected[0], rtol=1e-4, atol=1e-4)


def test_the_final_norm_alone_and_nothing(verifier_config):
    head = make(verifier_config)
    found = parameters_of_verifier(head, verifier_config, TrainConfig(init=HeadInit.norm))
    assert found.keys() == {"norm.weight"}
    assert torch.equal(found["norm.weight"], VerifierWeights(verifier_config).final_norm()["weight"])
    assert parameters_of_verifier(head, verifier_config, TrainConfig()) == {}


@pytest.mark.parametrize(
    ("draft", "init", "message"),
    [
        ({"intermediate_size": 80}, "layers", r"layers.0.mlp.down_proj.weight of shape \[\d+, \d+\], not \[\d+, 80\]"),
        ({"qk_norm": True}, "layers", "no layers.0.self_attn.k_norm.weight; no layers.0.self_attn.q_norm.weight: set"),
        ({"hidden_size": 32}, "norm", r"norm.weight of shape \[\d+\], not \[32\]: set draft.attention_bias"),
    ],
)
def test_a_verifier_of_another_form_is_refused_by_what_differs(verifier_config, draft, init, message):
    with pytest.raises(ValueError, match=f"train.init={init} needs a verifier of the head's form.* {message}"):
        parameters_of_verifier(make(verifier_config, **draft), verifier_config, TrainConfig(init=HeadInit[init]))


def test_layers_beyond_the_verifiers_are_refused(verifier_config):
    head, train = make(verifier_config, num_layers=2), TrainConfig(init=HeadInit.layers, init_layer=7)
    with pytest.raises(ValueError, match=r"train.init_layer must lie between 0 and 6: .*8 layers, the head 2, got 7"):
        parameters_of_verifier(head, verifier_config, train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": HeadInit.norm, "init_from": "elsewhere"}, "train.init must be random with train.init_from, got norm"),
        ({"init_layer": 3}, "train.init must be layers with train.init_layer=3, got random"),
        ({"muon_lr": 1e-3}, "train.optimizer must be muon with train.muon_lr=0.001: set it, or muon_lr to null"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes, message):
    config = Config(name="start")
    config.train = replace(config.train, **changes)
    config.verifier.path = "somewhere"
    with pytest.raises(ValueError, match=message):
        validate(config)
