"""DeepSpeed in every form that fledge trains in: steps without an update leave nothing behind, and nothing waits."""

from pathlib import Path

import pytest
from commands import script_result

FORMS = [
    *("zero0-float32", "zero1-float32", "zero1-bfloat16", "zero1_offload-float32", "zero1_offload-bfloat16"),
    *("zero2-float32", "zero2-bfloat16", "zero2_offload-float32", "zero2_offload-bfloat16"),
    *("zero3-float32", "zero3-bfloat16", "zero3_offload-float32", "zero3_offload-bfloat16"),
]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "two_ranks"])
def runs(request):
    """Give what engine_runs.py found, by form: of each rank a run with steps that are not finite, and without."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    found = script_result(Path(__file__).with_name("engine_runs.py"), *(launcher if request.param > 1 else []))
    assert all(len(ranks) == request.param for ranks in found.values())
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
