"""Layers with a sliding window: the split attention, the engine and cached decoding, against the mask written out."""

import pytest
import torch
from builders import make_batch, make_head, matrices
from fledge.models.head import ttt_attention
from fledge.models.head.ttt_attention import Kind, Span, SplitAttention, TTTAttention
from fledge.train.loss.rows import PackedBatch, find_useful_rows
from fledge.train.loss.unroll import TTTModule, unroll
from one_sequence import OneSequence
from plain_ttt import PlainTTTModule
from small_heads import assert_same_with_gradients

FORMS = {
    "window": {"sliding_window": 6, "window_layers": (0,)},
    "of_three_layers_two": {"num_layers": 3, "sliding_window": 7, "window_layers": (0, 2)},
    "of_two_layers_the_last": {"num_layers": 2, "sliding_window": 5, "window_layers": (1,), "norm_output": False},
}
of_every_form = pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)


def pairs(spans, reach):
    """Which keys each query sees, block by block, as a list."""
    rows = [row for span in spans for row in range(span.first, span.first + span.rows)]
    for queries, keys, kind in ttt_attention._blocks(spans, reach):
        sees = {Kind.EVERY: lambda i, j: True, Kind.UP_TO_OWN: int.__ge__, Kind.FROM_OWN: int.__le__}[kind]
        of_block = list(enumerate(range(keys.start, keys.stop)))
        assert kind is Kind.EVERY or len(of_block) == len(rows[queries])
        yield from ((row, key) for i, row in enumerate(rows[queries]) for j, key in of_block if sees(i, j))


@pytest.mark.parametrize("reach", [1, 2, 7, 40])
def test_blocks_hold_every_key_within_reach_once(reach):
    spans = [Span(3, 3, 30), Span(33, 40, 1), Span(33, 43, 50), Span(100, 100, reach)]
    rows = [(span.document, row) for span in spans for row in range(span.first, span.first + span.rows)]
    expected = [(row, key) for first, row in rows for key in range(max(first, row - reach + 1), row + 1)]
    assert sorted(pairs(spans, reach)) == expected


def test_a_document_within_the_window_is_not_cut():
    spans = [Span(0, 4, 20), Span(30, 30, 24)]
    assert list(ttt_attention._blocks(spans, 24)) == list(ttt_attention._blocks(spans, 10**9))
    assert len(list(ttt_attention._blocks(spans, 23))) > len(list(ttt_attention._blocks(spans, 24)))


def written_out(q, k, v, first, row, step, window):
    """The attention of one row at one step."""
    at = [*range(max(first, row + step - window + 1), row + 1)]
    keys, values = ([x[0][key] for key in at] + [x[j][row] for j in range(1, step + 1)] for x in (k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (torch.stack(x).repeat_interleave(group, 1) for x in (keys, values))
    weights = (torch.einsum("hd,shd->hs", q[step][row], keys) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("window", [4, 5, 19, 70])
def test_split_attention_equals_the_mask_written_out_forward_and_backward(window, kernel, monkeypatch):
    if not kernel:  # as on devices without one, in blocks of two rows
        monkeypatch.setattr(ttt_attention, "_has_kernel", lambda _: False)
        monkeypatch.setattr(
            ttt_attention, "_row_blocks", lambda n, _: [slice(i, min(i + 2, n)) for i in range(0, n, 2)]
        )
    generator, lengths, steps = torch.Generator().manual_seed(0), [5, 1, 70, 3], 4
    mask = torch.rand(sum(lengths), generator=generator) < 0.9
    rows = find_useful_rows(mask, lengths, steps)

    def draw(width):
        shape = (steps, len(mask), width, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(4), draw(2), draw(2)
    split = SplitAttention(rows, num_layers=2, window=lambda layer: window if layer else None)
    plain = TTTAttention(lengths, num_layers=1, window=lambda _: window)
    found, in_plain, expected = [], [], []
    for step in range(steps):
        at = rows.rows[rows.steps[step]]
        own = slice(None) if step == 0 else at
        found.append(split.at(step)(1, q[step][at], k[step][own], v[step][own]))
        in_plain.append(plain(0, q[step], k[step], v[step])[at])
        firsts = zip(rows.firsts[at].tolist(), at.tolist(), strict=True)
        expected.append(torch.stack([written_out(q, k, v, *bounds, step, window) for bounds in firsts]))
    torch.testing.assert_close(in_plain, expected, rtol=1e-9, atol=1e-9)
    assert_same_with_gradients(found, expected, (q, k, v), generator)


def results(module, batch, *matrices_):
    module.zero_grad()
    loss, sums = module(batch, *matrices_)
    loss.backward()
    return loss.detach(), sums, [parameter.grad.clone() for parameter in module.parameters()]


@of_every_form
@pytest.mark.parametrize("recompute", [False, True])
def test_the_engine_equals_its_plain_twin(changes, recompute):
    head, batch = make_head(**changes).double(), make_batch([37, 1, 9], seed=4, dtype=torch.float64)
    inputs = batch, *(matrix.double() for matrix in matrices())
    found = results(TTTModule(head, 4, 0.8, recompute=recompute), *inputs)
    expected = results(PlainTTTModule(head, 4, 0.8), *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    everything = results(TTTModule(make_head(num_layers=head.config.num_layers).double(), 4, 0.8), *inputs)
    assert abs(float(found[0] - everything[0])) > 1e-4, "the window changes nothing"


def test_documents_within_the_window_have_the_very_bits_of_a_head_without_one():
    batch = make_batch([17, 1, 20], seed=4)
    windows = [{}, {"sliding_window": 24, "window_layers": (0, 1)}]
    ours, windowed = (results(TTTModule(make_head(num_layers=2, **w), 4, 0.8), batch, *matrices()) for w in windows)
    torch.testing.assert_close(windowed, ours, rtol=0, atol=0)


@of_every_form
def test_packed_documents_give_the_states_and_gradients_of_documents_alone(changes):
    head, embedding = make_head(**changes).double(), matrices()[0].double()
    packed = make_batch([12, 3, 25], seed=5, dtype=torch.float64)

    def summed(batch):
        states = unroll(head, batch, batch.useful_rows(3), embedding)
        (sum(x.square().sum() for x in states)).backward()
        return states

    together = summed(packed)
    gradients = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    starts = [0, 12, 15]
    alone = []
    for start, length in zip(starts, packed.lengths, strict=True):
        part = slice(start, start + length)
        tensors = (packed.aux_hidden_states[part], packed.last_hidden_state[part])
        ids = packed.input_ids[part], packed.loss_mask[part], torch.zeros(length, dtype=torch.long)
        alone.append(summed(PackedBatch(*ids, torch.arange(length), *tensors, [length], ["x"])))
    for step, states in enumerate(together):
        torch.testing.assert_close(states, torch.cat([one[step] for one in alone]), rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(head.named_parameters())[name].grad, gradient, rtol=1e-9, atol=1e-9)


def trained_logits(head, ids, aux, row, num_steps, embedding):
    """The logits [K, Vd] that training has at a row of one text; states after the row are never read."""
    batch = make_batch([len(ids)], dtype=torch.float64)
    batch.input_ids, batch.loss_mask = torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool)
    batch.aux_hidden_states[: len(aux)] = aux
    rows = batch.useful_rows(num_steps)
    states = unroll(head, batch, rows, embedding)
    at = [int((rows.rows[places] == row).nonzero()) for places in rows.steps]
    return torch.stack([head.lm_head(normed[place]) for normed, place in zip(states, at, strict=True)])


def text_of(length):
    generator = torch.Generator().manual_seed(5)
    aux = torch.randn(length, 96, generator=generator, dtype=torch.float64)
    return torch.randint(120, (length,), generator=generator).tolist(), aux


@of_every_form
@torch.no_grad()
def test_ttt_step_k_gives_the_logits_of_cached_decoding_at_draft_token_k(changes):
    head, embedding = make_head(**changes).double(), matrices()[0].double()
    (ids, aux), row, num_steps = text_of(40), 29, 5
    decoder = OneSequence(head, embedding)
    for first, last in ((0, 18), (18, 19), (19, row + 1)):  # a prompt longer than the window, and rounds after it
        decoder.extend(ids[first + 1 : last + 1], aux[first:last])
        decoder.propose()
    expected = trained_logits(head, ids, aux, row, num_steps, embedding)
    for step in range(num_steps):
        if step:
            decoder.feed(ids[row + 1 + step], step)
        torch.testing.assert_close(decoder.logits(), expected[step], rtol=1e-9, atol=1e-9)


def tree_nodes(head, embedding, ids, aux, row):
    """Every node that a tree of depth 4 and 4 nodes a level feeds after a row: the tokens on its path, its logits."""
    decoder = OneSequence(head, embedding, 12, tree_depth=4, tree_top_k=4)
    decoder.extend(ids[1 : row + 2], aux[: row + 1])
    run, fed, nodes = decoder._decoder._run, {}, []

    def recorded(tokens, state, slots, positions, seen, sequences):
        after, normed = run(tokens, state, slots, positions, seen, sequences)
        fed.update(zip(slots[0].tolist(), tokens[0].tolist(), strict=True))
        for sees, logits in zip(seen[0], head.lm_head(normed[0]), strict=True):
            nodes.append(([fed[slot] for slot in sees.nonzero().squeeze(1).tolist() if slot > row], logits))
        return after, normed

    decoder._decoder._run = recorded
    decoder.propose()
    assert sorted(len(path) for path, _ in nodes) == [1] * 4 + [2] * 4 + [3] * 4
    return nodes


@of_every_form
@torch.no_grad()
def test_ttt_step_k_gives_the_logits_of_every_node_of_a_tree_at_depth_k(changes):
    head, embedding = make_head(**changes).double(), matrices()[0].double()
    (ids, aux), row = text_of(30), 19
    for path, logits in tree_nodes(head, embedding, ids, aux, row):
        text = [*ids[: row + 2], *path, 0, 0]
        expected = trained_logits(head, text, aux[: row + 1], row, len(path) + 1, embedding)[len(path)]
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 2, 3])
@torch.no_grad()
def test_a_node_deeper_than_the_window_has_the_logits_of_a_chain(window):
    """It is within the window of others by depth, and not by slot."""
    head, embedding = make_head(sliding_window=window, window_layers=(0,)).double(), matrices()[0].double()
    (ids, aux), row = text_of(30), 19
    for path, logits in tree_nodes(head, embedding, ids, aux, row):
        decoder = OneSequence(head, embedding)
        decoder.extend(ids[1 : row + 2], aux[: row + 1])
        for step, token in enumerate(path, 1):
            decoder.feed(token, step)
        torch.testing.assert_close(logits, decoder.logits(), rtol=1e-9, atol=1e-9)


def test_more_draft_steps_than_the_window_has_positions_are_refused():
    head, batch = make_head(sliding_window=3, window_layers=(0,)), make_batch([30])
    TTTModule(head, 3, 0.8)(batch, *matrices())
    with pytest.raises(ValueError, match=r"train\.ttt_steps .* at most the head's sliding_window of 3, got 4"):
        TTTModule(head, 4, 0.8)(batch, *matrices())
