"""DeepSpeed in every form that fledge trains in: what an update is, and that skipped ones leave nothing behind."""

from pathlib import Path

import pytest
import torch
from builders import make_head
from commands import script_result
from fledge.conf.schema import OptimizerName, TrainConfig
from fledge.train.engine import Muon, make_optimizer
from fledge.train.loss.unroll import TTTModule

FORMS = [
    *("zero0-float32", "zero1-float32", "zero1-bfloat16", "zero1_offload-float32", "zero1_offload-bfloat16"),
    *("zero2-float32", "zero2-bfloat16", "zero2_offload-float32", "zero2_offload-bfloat16"),
    *("zero3-float32", "zero3-bfloat16", "zero3_offload-float32", "zero3_offload-bfloat16"),
]


@pytest.fixture(
    scope="module",
    params=[(1, "adamw"), (2, "muon"), pytest.param((2, "adamw"), marks=pytest.mark.slow)],
    ids=["alone", "two_ranks_muon", "two_ranks"],
)
def runs(request):
    """Give what engine_runs.py found, by form: of each rank a run with steps that are not finite, and without."""
    ranks, optimizer = request.param
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    found = script_result(Path(__file__).with_name("engine_runs.py"), *launcher, arguments=[optimizer])
    assert all(len(of_ranks) == ranks for of_ranks in found.values())
    return found


@pytest.mark.parametrize("form", FORMS)
def test_after_steps_that_are_not_finite_training_goes_on_as_without_them(runs, form):
    for among, alone in runs[form]:
        assert among["applied"] == [True, False, False, True, True]
        assert alone["applied"] == [True, True, True]
        assert among["losses"] == alone["losses"], "to the last bit"
        assert len(set(alone["losses"])) == 6


@pytest.mark.parametrize("form", FORMS)
def test_deepspeed_never_waits_for_the_device(runs, form):
    assert [[run["waits"] for run in rank] for rank in runs[form]] == [[0, 0]] * len(runs[form])


@pytest.mark.parametrize("form", FORMS)
def test_every_zero_stage_trains_as_stage_0_does(runs, form):
    tolerance = 1e-6 if form.endswith("float32") else 1e-2
    for (_, ours), (_, theirs) in zip(runs[form], runs["zero0-float32"], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)


@pytest.mark.parametrize("shape", [(48, 32), (16, 64), (32, 32)])
def test_two_steps_of_muon_equal_plain_ones_in_float64_and_nearly_those_of_torch(shape):
    generator, betas = torch.Generator().manual_seed(0), (0.9, 0.95)
    start, *gradients = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    ours = torch.nn.Parameter(start.float())
    theirs = torch.nn.Parameter(start.float())
    muon = Muon([], [ours], 2.0, torch.float32, lr=0.01, weight_decay=0.1, betas=betas)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.float(), gradient.float()
        muon.step()
        peer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = 0.95 * momentum + 0.05 * gradient
        left, values, right = torch.linalg.svd(direction, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(shape) ** 0.5 * left @ values.diag() @ right
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # torch multiplies in bfloat16


def test_muon_trains_the_matrices_of_layers_and_fc_alone():
    module = TTTModule(make_head(num_layers=2, attention_bias=True), 2, 0.8)
    optimizer = make_optimizer(module, TrainConfig(optimizer=OptimizerName.muon, muon_lr=3e-4))
    rest, matrices = optimizer.param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = sorted(names[id(parameter)].removeprefix("head.") for parameter in matrices["params"])
    projections = [f"self_attn.{name}_proj.weight" for name in "kqvo"]
    projections += [f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert found == sorted(["fc.weight", *(f"layers.{layer}.{name}" for layer in (0, 1) for name in projections)])
    assert len(rest["params"]) + len(found) == len(names)
    assert optimizer.lr_factor == pytest.approx(3)
