"""The fused engine against its plain twin: values, gradients, metrics, on ugly shapes."""

import weakref

import pytest
import torch
from builders import leave_out_first_tokens, make_batch, make_head, matrices
from fledge.models.head import ttt_attention
from fledge.models.head.ttt_attention import SplitAttention, TTTAttention
from fledge.models.verifier.config import LogitTransform
from fledge.train.loss import fused as fused_loss
from fledge.train.loss import unroll as ttt
from fledge.train.loss.fused import SUMS
from fledge.train.loss.losses import LOSSES
from fledge.train.loss.rows import find_useful_rows
from fledge.train.loss.unroll import TTTModule, unroll
from plain_ttt import PlainTTTModule, counted_rows, plain_unroll
from small_heads import FORMS, assert_same_with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

RUNNING = torch.tensor([0.5, 0.3, 0.2, 0.1])  # acceptance so far, for the losses that blend


def results(module, batch, embedding, lm_head, **options):
    """Loss, gradients by name and sums of one forward and backward pass."""
    module.zero_grad()
    loss, sums = module(batch, embedding, lm_head, **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sums


def assert_close(found, expected, relative):
    """Loss to a tenth of `relative`; every gradient to `relative` of its largest entry."""
    torch.testing.assert_close(found[0], expected[0], rtol=relative / 10, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(float(gradient.abs().max()), 1e-12)
        assert float((found[1][name] - gradient).abs().max()) <= relative * scale, name
    torch.testing.assert_close(found[2], expected[2], rtol=10 * relative, atol=relative)


def twins(head, loss="kl", ttt_steps=4, **options):
    return (kind(head, ttt_steps, 0.8, LOSSES[loss], **options) for kind in (TTTModule, PlainTTTModule))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows, so that answers and windows are cut everywhere."""
    monkeypatch.setattr(fused_loss, "rows_in_chunk", lambda *_: 3)
    monkeypatch.setattr(ttt, "rows_in_chunk", lambda *_: 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("draft_vocab_size", [60, None])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_equals_its_definition_and_autograds_gradient(loss, draft_vocab_size):
    """In float64 to 1e-6, and in float32 no further than 1e-5 from that."""

    def found(kind, dtype):
        head = make_head(draft_vocab_size=draft_vocab_size).to(dtype)
        batch = make_batch([17, 1, 2, 31, 9], seed=3).to(torch.device("cpu"), dtype, 4)
        module = kind(head, 4, 0.8, LOSSES[loss], transform=LogitTransform(scale=0.3))
        return results(module, batch, *(matrix.to(dtype) for matrix in matrices()), acceptance=RUNNING)

    exact = found(PlainTTTModule, torch.float64)
    assert_close(found(TTTModule, torch.float64), exact, 1e-6)
    value, gradients, sums = found(TTTModule, torch.float32)
    widened = {name: gradient.double() for name, gradient in gradients.items()}
    assert_close((value.double(), widened, sums.double()), exact, 1e-5)
    assert any("lm_head.weight" in name for name in gradients)


@pytest.mark.parametrize("budget", [3, 1000])
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [1, 1, 1]),
        ({}, [37]),
        ({"num_layers": 2}, [13, 1, 22]),
        ({"num_layers": 3, "norm_output": False, "norm_before_residual": True, "fc_norm": False}, [13, 1, 22]),
        ({"aux_layers": (0, 1, 2, 5, 6), "num_key_value_heads": 1}, [5, 6, 7]),
        ({"aux_layers": (2,), "num_key_value_heads": 4}, [19, 3]),
        ({"hidden_size": 24, "own_embedding": True}, [19, 3]),
        *((changes, [13, 1, 22]) for changes in FORMS.values()),
    ],
    ids=[
        "single_rows",
        "one_document",
        "two_layers",
        "eagle3_three_layers",
        "five_aux_states",
        "one_aux_state_no_gqa",
        "narrow",
        *FORMS,
    ],
)
def test_the_engine_equals_its_plain_twin(changes, lengths, budget, monkeypatch):
    monkeypatch.setattr(fused_loss, "rows_in_chunk", lambda *_: budget)
    head = make_head(**changes)
    batch = make_batch(lengths, seed=4, aux=len(head.config.aux_layers))
    embedding, lm_head = matrices()
    fused, plain = twins(head)
    assert_close(results(fused, batch, embedding, lm_head), results(plain, batch, embedding, lm_head), 1e-5)


@pytest.mark.parametrize("changes", [{"num_layers": 2}, FORMS["deep_with_all"]], ids=["two_layers", "deep_with_all"])
def test_a_frozen_lm_head_and_recomputed_steps_change_no_gradient(changes):
    head = make_head(**changes)
    head.lm_head.weight.requires_grad_(False)
    batch = make_batch([21, 9], seed=7, aux=len(head.config.aux_layers))
    embedding, lm_head = matrices()
    fused, plain = twins(head, recompute=True)
    found = results(fused, batch, embedding, lm_head)
    assert_close(found, results(plain, batch, embedding, lm_head), 1e-5)
    assert "head.lm_head.weight" not in found[1]


def test_attention_that_is_made_again_keeps_nothing_new():
    """What is made again in the backward pass would keep all that the layers below it were made of."""
    rows = find_useful_rows(torch.ones(9, dtype=torch.bool), [9], 1)
    q, k, v = torch.randn(9, 2, 8)[rows.rows], torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    attend = SplitAttention(rows, 1).at(0)
    attend(0, q, k, v)
    again = k.clone()
    attend(0, q, again, v)
    left = weakref.ref(again)
    del again
    assert left() is None


def test_capped_logits_of_the_verifier_are_the_targets():
    head = make_head(draft_vocab_size=None)
    batch = make_batch([25], seed=1)
    embedding, lm_head = matrices()
    fused, plain = twins(head, transform=LogitTransform(softcap=2.0))
    found = results(fused, batch, embedding, lm_head)
    assert_close(found, results(plain, batch, embedding, lm_head), 1e-5)
    assert found[0] != results(TTTModule(head, 4, 0.8), batch, embedding, lm_head)[0]


@pytest.mark.parametrize("loss", ["kl", "acceptance_length"])
def test_gradients_equal_finite_differences_in_float64(loss):
    head = make_head(draft_vocab_size=None).double()
    batch = make_batch([9, 7], seed=2)
    batch.loss_mask[:] = True
    embedding, lm_head = (matrix.double() for matrix in matrices())
    batch.aux_hidden_states, batch.last_hidden_state = (
        batch.aux_hidden_states.double(),
        batch.last_hidden_state.double(),
    )
    module = TTTModule(head, 3, 0.8, LOSSES[loss])

    def value():
        return module(batch, embedding, lm_head * 0.3, acceptance=RUNNING[:3])[0]

    module.zero_grad()
    value().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in head.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = value()
            parameter -= 2e-6 * direction
            below = value()
            parameter += 1e-6 * direction
        slope = float((above - below) / 2e-6)
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5, abs=1e-8), name


def test_bfloat16_is_no_further_from_float64_than_the_plain_twin():
    embedding, lm_head = (matrix.bfloat16() for matrix in matrices())
    far: dict[str, list[float]] = {"fused": [], "plain": []}
    for seed in range(6):
        head = make_head(seed=seed).bfloat16()
        batch = make_batch([40, 25], seed=seed)
        batch.aux_hidden_states, batch.last_hidden_state = (
            states.bfloat16() for states in (batch.aux_hidden_states, batch.last_hidden_state)
        )
        fused, plain = (results(module, batch, embedding, lm_head) for module in twins(head))
        batch.aux_hidden_states, batch.last_hidden_state = (
            states.double() for states in (batch.aux_hidden_states, batch.last_hidden_state)
        )
        exact = results(next(twins(head.double())), batch, embedding.double(), lm_head.double())
        for name, found in (("fused", fused), ("plain", plain)):
            distances = [
                float((found[1][key].double() - gradient).norm() / gradient.norm())
                for key, gradient in exact[1].items()
            ]
            far[name].append(sum(distances) / len(distances))
    assert sum(far["fused"]) <= 1.02 * sum(far["plain"])


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, *FORMS.values()], ids=["eagle3_1", "two_layers", *FORMS])
def test_gathered_rows_equal_all_rows(changes):
    head = make_head(**changes)
    batch = make_batch([14, 1, 30], seed=11, aux=len(head.config.aux_layers))
    embedding, _ = matrices()
    rows = batch.useful_rows(5)
    with torch.no_grad():
        everywhere = list(plain_unroll(head, batch, embedding, 5))
        for places, here, states in zip(rows.steps, unroll(head, batch, rows, embedding), everywhere, strict=True):
            torch.testing.assert_close(here, states[rows.rows[places]], rtol=1e-5, atol=1e-5)


def test_useful_rows_are_the_counted_rows():
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        lengths = torch.randint(1, 15, (5,), generator=generator).tolist()
        mask = torch.rand(sum(lengths), generator=generator) < 0.3 + 0.035 * trial
        document = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
        rows = find_useful_rows(mask, lengths, 6)
        counted = counted_rows(mask, document, 6)
        for step in range(6):
            at = rows.rows[rows.steps[step]]
            assert at.tolist() == counted[step].nonzero().squeeze(1).tolist()
            assert at.tolist() == [r for span in rows.spans[step] for r in range(span.first, span.first + span.rows)]
            before = rows.steps[step - 1] if step else torch.arange(len(rows.rows))
            assert torch.equal(before[rows.from_previous[step]], rows.steps[step])
            assert all(start == int((rows.steps[step] < j).sum()) for j, start in enumerate(rows.starts[step]))


def blockwise(monkeypatch):
    """The form of `flash_forward` and `flash_backward` for devices without a kernel, in blocks of two rows."""
    monkeypatch.setattr(ttt_attention, "_has_kernel", lambda _: False)
    monkeypatch.setattr(ttt_attention, "_row_blocks", lambda n, _: [slice(i, min(i + 2, n)) for i in range(0, n, 2)])


def test_gradients_of_keys_are_summed_over_blocks_in_float32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(512, 2, 16, generator=generator).to(torch.bfloat16) for _ in range(4))
    exact = [x.double() for x in (q, k, v)]
    out, lse = ttt_attention.flash_forward(*exact, causal=True)
    expected = ttt_attention.flash_backward(grad.double(), *exact, out, lse, causal=True)[1:]
    monkeypatch.setattr(ttt_attention, "_has_kernel", lambda _: False)

    def errors() -> list[float]:
        found = ttt_attention.flash_backward(grad, q, k, v, out.to(q.dtype), lse.float(), causal=True)[1:]
        return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]

    whole = errors()
    blockwise(monkeypatch)
    in_blocks = errors()
    assert all(few < 1.5 * one for few, one in zip(in_blocks, whole, strict=True)), (in_blocks, whole)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
def test_split_attention_equals_the_plain_form_forward_and_backward(heads, kv_heads, kernel, monkeypatch):
    if not kernel:
        blockwise(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    lengths, steps = [5, 1, 70, 3], 4
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.9
    rows = find_useful_rows(mask, lengths, steps)

    def draw(width):
        shape = (steps, total, width, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    split, plain = SplitAttention(rows, num_layers=1), TTTAttention(lengths, num_layers=1)
    found, expected = [], []
    for step in range(steps):
        at = rows.rows[rows.steps[step]]
        own = slice(None) if step == 0 else at
        found.append(split.at(step)(0, q[step][at], k[step][own], v[step][own]))
        expected.append(plain(0, q[step], k[step], v[step])[at])
    assert_same_with_gradients(found, expected, (q, k, v), generator)


def test_rows_whose_greedy_token_cannot_be_drafted_are_reported_and_not_counted():
    head = make_head(draft_vocab_size=40)
    batch = make_batch([30], seed=2)
    batch.loss_mask[:] = True
    embedding, lm_head = matrices()
    _, sums = TTTModule(head, 3, 0.8)(batch, embedding, lm_head)
    counted, outside = (sums[:, SUMS.index(name)] for name in ("counted", "outside_draft_vocab"))
    assert (counted + outside).tolist() == [28, 27, 26]
    assert float(outside.min()) > 0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_greedy_token_below_the_whole_draft_vocabulary_is_one_outside_like_any_other(loss):
    head, batch, (embedding, lm_head) = make_head(), make_batch([17, 30], seed=3), matrices()
    leave_out_first_tokens(head, batch, lm_head)
    fused, plain = (results(module, batch, embedding, lm_head, acceptance=RUNNING) for module in twins(head, loss))
    assert_close(fused, plain, 1e-5)
    assert float(fused[2][:, SUMS.index("outside_draft_vocab")].min()) > 0


class Waits(TorchDispatchMode):
    """Records operations whose result the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_step_never_waits_for_the_device(loss):
    head = make_head(draft_vocab_size=60, num_layers=2)
    batch = make_batch([17, 30], seed=3).to(torch.device("cpu"), torch.float32, 4)
    embedding, lm_head = matrices()
    with Waits() as waits:
        TTTModule(head, 4, 0.8, LOSSES[loss])(batch, embedding, lm_head, acceptance=RUNNING)[0].backward()
    assert waits.found == []
    with Waits() as waits:
        PlainTTTModule(head, 4, 0.8, LOSSES[loss])(batch, embedding, lm_head, acceptance=RUNNING)
    assert "nonzero" in waits.found, "the plain twin does wait"


def test_a_large_vocabulary_costs_no_digits_of_the_loss():
    head = make_head(draft_vocab_size=None, vocab_size=100_000)
    batch = make_batch([12], vocab=100_000)
    batch.loss_mask[:] = True
    embedding, lm_head = matrices(vocab=100_000)
    with torch.no_grad():
        found = TTTModule(head, 2, 0.8)(batch, embedding, lm_head * 0.3)[0]
        batch.aux_hidden_states = batch.aux_hidden_states.double()
        batch.last_hidden_state = batch.last_hidden_state.double()
        exact = PlainTTTModule(head.double(), 2, 0.8)(batch, embedding.double(), lm_head.double() * 0.3)[0]
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
