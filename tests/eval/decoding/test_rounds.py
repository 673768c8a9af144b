"""A round of speculative decoding depends on no value that the host would have to read, which a graph cannot hold.

What else a graph cannot hold, copies from the host, is not seen on a CPU.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from commands import import_without
from decoding import main
from decoding_twins import SHAPES, Loop
from fledge.conf.schema import DraftSampling
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.decoding.speculator import Request
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = {  # operations whose result, or its shape, the host must know
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
RULES = {
    "greedy": AcceptanceRule(),
    "sampled": AcceptanceRule(0.8),
    "cut": AcceptanceRule(0.8, top_p=0.9, top_k=10),
    "drawn": AcceptanceRule(0.8, draft_sampling=DraftSampling.sampled),
}


class NoLook(TorchDispatchMode):
    """Raise where the host looks at values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in LOOKS, name
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        by_mask = "index" in name and any(getattr(index, "dtype", None) == torch.bool for index in indices)
        assert not by_mask, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("look", [lambda x: int(x[0]), lambda x: x[x > 0], lambda x: x.nonzero(), torch.unique, bool])
def test_a_look_at_values_is_found_out(look):
    with NoLook(), pytest.raises(AssertionError):
        look(torch.ones(1))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("shape", "window"), [*((shape, None) for shape in [*SHAPES, "none"]), ("tree", 6)])
def test_a_round_looks_at_no_value(shape, window, rule):
    speculator, drafter = Loop(window=window).speculator("chain" if shape == "none" else shape, rule)
    drafter = NoDraft() if shape == "none" else drafter
    speculator.decode(drafter)
    with torch.no_grad(), NoLook():
        speculator._round(drafter, 64)


class Recorded:
    """In place of CUDA graphs: what a round reads and writes must stay where it was, as long as its key is known."""

    def __init__(self, speculator, drafter, within=contextlib.nullcontext):
        self.speculator, self.drafter, self.known, self.runs = speculator, drafter, {}, 0
        self.within = within

    def clear(self):
        self.known.clear()

    def run(self, key, function):
        drafter = self.drafter
        caches = [*self.speculator.cached.cache.tensors, drafter._cache, drafter._positions, *drafter._rotary]
        own = self.speculator._draws, self.speculator._proposed, self.drafter._state
        at = [tensor.data_ptr() for tensor in (*caches, *own)]
        assert self.known.setdefault(key, at) == at, "a graph would use memory that is gone"
        self.runs += 1
        with self.within():
            return function()


def test_a_round_that_is_known_finds_its_memory_where_it_was():
    loop, alone = Loop(window=12), NoDraft()
    speculator, drafter = loop.speculator("tree", RULES["sampled"])
    speculator._graphs = Recorded(speculator, drafter)
    for length in (9, 90, 20, 200, 30):
        prompts = [[(7 * i + place) % 40 for i in range(length)] for place in range(3)]
        speculator.cached.check([*prompts[0], *prompts[1], *prompts[2]])
        speculator.prefill([Request(prompt, 60, str(length)) for prompt in prompts])
        for one in (alone, drafter, alone, drafter):
            speculator.decode(one)
    assert len(speculator._graphs.known) < speculator._graphs.runs / 5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_prompt_lookup_reads_on_the_host_stays_outside_of_its_graph(rule):
    loop, lookup = Loop(max_tokens=20), PromptLookup(3, 3)
    speculator, drafter = loop.speculator("tree", rule)
    expected = speculator.decode(lookup)
    speculator._graphs = Recorded(speculator, drafter, within=NoLook)
    found = speculator.decode(lookup)
    assert [(one.tokens, one.drafted, one.accepted) for one in found] == [
        (one.tokens, one.drafted, one.accepted) for one in expected
    ]
    assert sum(map(sum, (one.accepted for one in found))) > 0
    assert speculator._graphs.runs == max(len(one.drafted) for one in found)


SMALL = ["hidden_size=32", "intermediate_size=48", "num_attention_heads=4", "head_dim=8", "vocab_size=60"]
SMALL += ["draft_vocab_size=40", "rounds=6"]


@pytest.mark.parametrize("shape", [[], ["num_draft_tokens=6", "tree_depth=3", "tree_top_k=3", "batch_size=2"]])
def test_the_benchmark_tells_what_a_round_costs_and_where(capsys, shape):
    main([*SMALL, *shape, "temperature=0.5", "draft_sampling=greedy"])
    result = json.loads(capsys.readouterr().out)
    parts = result["parts_cpu_s"]
    assert parts["verifier"] + parts["propose"] + parts["extend"] < parts["round"]
    assert 0 < parts["head_linear"] < parts["head"] < parts["propose"] + parts["extend"]
    shares = [result[f"share_outside_verifier{more}"] for more in ("_and_head", "_and_head_linear", "")]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert result["acceptance_length_to_break_even"] > 1
    assert result["options"]["hidden_size"] == 32


def test_the_benchmark_imports_with_torch_and_transformers_alone():
    without = ("omegaconf", "hydra", "deepspeed", "accelerate", "datasets", "wandb", "matplotlib", "triton")
    import_without("decoding", *without)


def test_the_benchmark_refuses_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device is cuda, and this machine has no GPU"):
        main(["preset=llama8b"])
