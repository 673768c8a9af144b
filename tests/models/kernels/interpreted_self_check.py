"""The kernels' self-check in Triton's interpreter, with faults planted in the kernels: run by test_kernels.py."""

import importlib.util
import sys
from pathlib import Path

import kl_kernel
import pytest
import torch
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.kernel_checks import decoding_checks
from fledge.models import kernels
from fledge.models.kernels.self_check import Check, check_kernels
from fledge.train.loss import kernel_checks
from fledge.train.loss.kernel_checks import compare_attention
from interpreted_decoding import DRAWN
from small_heads import make_head

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Let the kernels run on this CPU, on short documents."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_checks, "LENGTHS", [40, 1, 7, 2])


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Give a function that replaces text in a kernel's module."""

    def put(module, old, new):
        is_ours = module == "kl_kernel"
        text = Path(kl_kernel.__file__ if is_ours else Path(kernels.__file__).with_name(f"{module}.py")).read_text()
        assert old in text
        file = tmp_path / f"{module}.py"
        file.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(module if is_ours else f"fledge.models.kernels.{module}", file)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, planted)
        monkeypatch.setattr(kernels, module, planted, raising=False)
        spec.loader.exec_module(planted)
        if is_ours:
            monkeypatch.setattr(kl_kernel, "kl_rows", planted.kl_rows)

    return put


def attention(dtype=torch.float32, num_layers=2, **window):
    head = make_head(num_layers=num_layers, **window).config
    return [Check("attention", lambda: compare_attention(head, 3, dtype, CPU))]


def decoding(rule, is_tree=False, dtype=torch.float32):
    head = make_head(vocab_size=300, hidden_size=96, head_dim=48).config
    return decoding_checks(rule, head, 5, is_tree, dtype, CPU)


KINDS = {
    "attention": attention,
    "attention of one layer": lambda dtype=torch.float32: attention(dtype, 1),
    "attention of a window": lambda dtype=torch.float32: attention(dtype, 1, sliding_window=9, window_layers=(0,)),
    "kl": lambda dtype=torch.float32: [Check("kl", lambda: kl_kernel.compare_kl(300, dtype, CPU, 5, 64))],
    "greedy": lambda dtype=torch.float32: decoding(AcceptanceRule(), dtype=dtype),
    "sampled tree": lambda dtype=torch.float32: decoding(AcceptanceRule(0.7), is_tree=True, dtype=dtype),
    "cut": lambda dtype=torch.float32: decoding(AcceptanceRule(0.7, 0.9, 50), dtype=dtype),
    "drawn": lambda dtype=torch.float32: decoding(DRAWN, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_agrees_with_its_plain_twin_and_is_used(kind, dtype, capsys):
    checks = KINDS[kind](dtype)
    used, record = check_kernels("train.triton", True, CPU, checks)
    assert used == set(record) == {check.kernel for check in checks}
    said = capsys.readouterr().out
    assert all(f"Triton kernel {name} agrees with its plain twin (" in said for name in used)


FAULTS = {
    "a row does not see itself": ("attention", "ttt_attention", "<= row[:, None]", "< row[:, None]"),
    "documents see each other": ("attention", "ttt_attention", "(key[None, :] >= first[:, None]) & ", ""),
    "another row's own step": ("attention", "ttt_attention", ".to(tl.int64) + query\n", ".to(tl.int64) + query // 2\n"),
    "a key's gradient unscaled": ("attention", "ttt_attention", "(dk_here * scale).to", "dk_here.to"),
    "one head's gradient alone": ("attention", "ttt_attention", "dv_here += weight", "dv_here = weight"),
    "queries' gradient of own steps": ("attention of one layer", "ttt_attention", "acc += dscore", "acc += 2 * dscore"),
    "does not compile": ("attention", "ttt_attention", "tl.exp2(peak - higher)", "tl.exp3(peak - higher)"),
    "mass forgotten": ("kl", "kl_kernel", "(q - p / mass_here)", "(q - p)"),
    "epsilon forgotten": ("greedy", "decoding", "/ num_columns + eps", "/ num_columns"),
    "rejected drafts counted": ("greedy", "decoding", "count += goes_on.to(tl.int32)", "count += 1"),
    "the last of equal tokens": (
        *("greedy", "choosing"),
        *("tl.min(tl.where(highest == peak, best, num_columns), 0)", "tl.max(tl.where(highest == peak, best, 0), 0)"),
    ),
    "half of the share": ("cut", "choosing", "number * total, num_columns", "number * total / 2, num_columns"),
    "temperature forgotten": (
        *("sampled tree", "choosing"),
        *("tl.div_rn(logit, temperature) - tl.div_rn(peak, temperature)", "logit - peak"),
    ),
    "a slot left behind": ("sampled tree", "decoding", "(source != target)", "(source > target + 1)"),
    "what q had, again": ("drawn", "choosing", " - of_drafter, 0.0)", ", 0.0)"),
}
NAMES = {"ttt_attention": "attention", "kl_kernel": "kl", "choosing": "choose"}
OF_DECODING = {"epsilon forgotten": "join", "rejected drafts counted": "way", "a slot left behind": "move"}


ONE_OF_EACH_KERNEL = [
    *("a row does not see itself", "does not compile", "mass forgotten", "epsilon forgotten"),
    *("rejected drafts counted", "the last of equal tokens", "a slot left behind"),
]


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in ONE_OF_EACH_KERNEL else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_planted_in_a_kernel_is_found_named_and_that_kernel_alone_left_out(fault, plant, caplog):
    kind, module, old, new = FAULTS[fault]
    name = OF_DECODING.get(fault) or NAMES[module]
    plant(module, old, new)
    checks = KINDS[kind]()
    used, record = check_kernels("train.triton", "auto", CPU, checks)
    assert used == {check.kernel for check in checks} - {name}
    (warning,) = caplog.messages
    assert f"Triton kernel {name} " in warning
    assert record[name]["reason"] in warning
    if fault == "does not compile":
        assert "fails (" in warning
        assert "exp3" in warning
    else:
        figures = record[name]["figures"].values()
        off = [f"off by {float('nan') if found is None else found:.1e}, allowed {most:.1e}" for found, most in figures]
        assert all(figure in warning for figure in off)


def test_a_fault_of_the_backward_pass_alone_is_found_there(plant):
    plant("ttt_attention", *FAULTS["a key's gradient unscaled"][2:])
    figures = check_kernels("train.triton", "auto", CPU, attention())[1]["attention"]["figures"]
    assert [found > allowed for found, allowed in figures.values()] == [False, True]
    assert list(figures) == ["outputs", "gradients"]
