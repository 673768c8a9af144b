"""A round of speculative decoding depends on no value that the host would have to read, so that a graph can hold it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from decoding_twins import SHAPES, Loop
from fledge.conf.schema import DraftSampling
from fledge.eval.acceptance import AcceptanceRule
from fledge.eval.benchmark import main
from fledge.eval.prompt_lookup import NoDraft
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
@pytest.mark.parametrize("shape", [*SHAPES, "none"])
def test_a_round_looks_at_no_value(shape, rule):
    speculator, drafter = Loop().speculator("chain" if shape == "none" else shape, rule)
    drafter = NoDraft() if shape == "none" else drafter
    speculator.decode(drafter)
    with torch.no_grad(), NoLook():
        speculator._round(drafter, 64)


SMALL = ["hidden_size=32", "intermediate_size=48", "num_attention_heads=4", "head_dim=8", "vocab_size=60"]
SMALL += ["draft_vocab_size=40", "rounds=6"]


@pytest.mark.parametrize("shape", [[], ["num_draft_tokens=6", "tree_depth=3", "tree_top_k=3", "batch_size=2"]])
def test_the_benchmark_tells_what_a_round_costs_and_where(capsys, shape):
    main([*SMALL, *shape, "temperature=0.5", "draft_sampling=greedy"])
    result = json.loads(capsys.readouterr().out)
    parts = result["parts_cpu_s"]
    assert parts["verifier"] + parts["propose"] + parts["extend"] < parts["round"]
    assert 0 < parts["head_linear"] < parts["propose"] + parts["extend"]
    assert 0 < result["share_outside_verifier_and_head_linear"] < result["share_outside_verifier"] < 1
    assert result["acceptance_length_to_break_even"] > 1
    assert result["options"]["hidden_size"] == 32


def test_the_benchmark_imports_with_torch_and_transformers_alone():
    code = (
        "import sys\n"
        "for name in ('omegaconf', 'hydra', 'deepspeed', 'accelerate', 'datasets', 'wandb', 'matplotlib', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import fledge.eval.benchmark"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_benchmark_refuses_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device is cuda, and this machine has no GPU"):
        main(["preset=llama8b"])
