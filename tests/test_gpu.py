"""The Triton kernels and the training engine on a real GPU, at sizes that matter.

    pytest --noconftest -m gpu tests/test_gpu.py

needs torch for CUDA, transformers and pytest alone.
"""

import pytest
import torch
from builders import make_batch, make_head, matrices
from fledge.models import ttt_attention
from fledge.train.plain import PlainTTTModule
from fledge.train.ttt import TTTModule
from kernel_twins import attention_errors, kl_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def kernels_only(monkeypatch):
    """Fail where the kernels are not what is run."""
    monkeypatch.setattr(ttt_attention.JoinedAttention, "apply", None)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "options"),
    [
        ([900, 1, 37, 1100], (8, 2), 128, {"ttt_steps": 7}),
        ([2048], (5, 1), 128, {"ttt_steps": 3, "counted": 0.97}),
        ([333, 500, 2], (4, 4), 80, {"ttt_steps": 3, "num_layers": 2}),
        ([700, 3, 300], (8, 4), 64, {"ttt_steps": 4}),
        ([31] * 20, (4, 2), 32, {"ttt_steps": 7}),
        ([257, 255], (2, 1), 96, {"ttt_steps": 2}),
        ([1, 2, 1], (4, 2), 64, {"ttt_steps": 3}),
    ],
    ids=["packed", "one_document", "every_row", "d64", "short_documents", "d96", "no_useful_row"],
)
def test_attention_equals_the_plain_form_forward_and_backward(lengths, heads, head_dim, options, dtype):
    outputs, gradients = attention_errors(lengths, heads, head_dim, dtype, "cuda", **options)
    print(f"{dtype}: outputs {outputs:.1e}, gradients {gradients:.1e}")
    assert outputs <= TOLERANCES[dtype]
    assert gradients <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [32000, 202048, 1001])
def test_rows_of_the_kl_loss_equal_their_definition(width, dtype):
    kl, overlap, gradient = kl_errors(150, width, dtype, "cuda", 2048)
    print(f"{dtype}, {width} columns: KL {kl:.1e}, overlap {overlap:.1e}, gradient {gradient:.1e}")
    assert kl <= 1e-4
    assert overlap <= 1e-5
    assert gradient <= {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


def on_gpu(batch, ttt_steps, dtype):
    return batch.to(torch.device("cuda"), dtype, ttt_steps)


def gradients_of(module, batch, *frozen):
    module.zero_grad()
    loss, sums = module(batch, *frozen)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sums


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("loss_kernel", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_engine_equals_its_plain_twin_in_float32(num_layers, loss_kernel):
    head = make_head(num_layers=num_layers).cuda()
    batch = on_gpu(make_batch([300, 1, 170, 40], seed=5), 7, torch.float32)
    frozen = [matrix.cuda() for matrix in matrices()]
    found = gradients_of(TTTModule(head, 7, 0.8, kernels=True, loss_kernel=loss_kernel), batch, *frozen)
    expected = gradients_of(PlainTTTModule(head, 7, 0.8), batch, *frozen)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-3, atol=1e-3)
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


@pytest.mark.usefixtures("kernels_only")
def test_a_step_in_bfloat16_gives_the_same_gradients_every_time():
    head = make_head().bfloat16().cuda()
    batch = on_gpu(make_batch([700, 90, 210], seed=6), 7, torch.bfloat16)
    frozen = [matrix.bfloat16().cuda() for matrix in matrices()]
    module = TTTModule(head, 7, 0.8, kernels=True)
    (_, first, _), (_, second, _) = (gradients_of(module, batch, *frozen) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("kernels_only")
def test_a_step_waits_for_nothing_on_the_device():
    head = make_head().bfloat16().cuda()
    batch = on_gpu(make_batch([700, 90, 210], seed=6), 7, torch.bfloat16)
    frozen = [matrix.bfloat16().cuda() for matrix in matrices()]
    module = TTTModule(head, 7, 0.8, kernels=True)
    gradients_of(module, batch, *frozen)
    module.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch, *frozen)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
