"""Held-out acceptance without decoding: what decoding would accept, row by row."""

import json

import pytest
import torch
from builders import leave_out_first_tokens, make_batch, make_head, matrices
from fledge.conf.schema import DraftSampling, EvaluateConfig
from fledge.eval.figures.results import acceptance_in_training
from fledge.models.verifier.config import LogitTransform
from fledge.train.heldout import (
    HeldoutCounts,
    acceptance,
    acceptance_by_position,
    count_heldout,
    teacher_forced_rounds,
    total,
)
from fledge.train.loss import fused as fused_loss
from fledge.train.loss.unroll import TTTModule
from one_sequence import OneSequence
from small_heads import FORMS


def decoded_row(head, ids, aux, last, row, num, transform):
    """Feed a decoder the text; give where its greedy tokens equal it, and sum_v min(P, q), at each draft token."""
    embedding, lm_head = matrices()
    decoder = OneSequence(head, embedding)
    decoder.extend(ids[1 : row + 2].tolist(), aux[: row + 1])
    hits, overlaps = [], []
    for step in range(num):
        if step:
            decoder.feed(int(ids[row + 1 + step]), step)
        logits = decoder.logits()
        q = torch.zeros(120).index_copy(0, head.target_ids, logits.softmax(-1))
        p = transform.apply_(last[row + 1 + step] @ lm_head.T).softmax(-1)
        hits.append(bool(head.target_ids[logits.argmax()] == ids[row + 2 + step]))
        overlaps.append(float(torch.minimum(p, q).sum()))
    return hits, overlaps


def test_a_conversation_whose_states_are_not_finite_leaves_the_others_as_they_are():
    head, (embedding, lm_head) = make_head(), matrices()
    module, batch = TTTModule(head, 2, 0.8), make_batch([13, 9, 9], seed=8)
    sound = count_heldout(module, [batch], embedding, lm_head, [3])[3]
    batch.aux_hidden_states[15] = torch.nan
    broken = count_heldout(module, [batch.without_non_finite()], embedding, lm_head, [3])[3]
    first, second, third = batch.sample_ids
    assert sound[second].rows > 0
    assert broken[second] == HeldoutCounts()
    assert broken[first] == sound[first]
    assert broken[third] == sound[third]


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "first_outside"),
    [
        ({"draft_vocab_size": None}, False),
        ({"draft_vocab_size": 60}, False),
        ({}, True),
        *((FORMS[form], False) for form in ("speculators", "five_layers_full_vocabulary", "window", "deep_with_all")),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [128 << 20, 40_000])
def test_each_row_accepts_what_a_decoder_fed_the_text_accepts(changes, first_outside, chunk_bytes, monkeypatch):
    monkeypatch.setitem(fused_loss.CHUNK_BYTES, "cpu", chunk_bytes)
    head = make_head(**changes)
    transform = LogitTransform(scale=0.5, softcap=4.0)
    batch, num = make_batch([13, 1, 9], seed=8, aux=len(head.config.aux_layers)), 3
    if first_outside:
        leave_out_first_tokens(head, batch, matrices()[1])
    module = TTTModule(head, 2, 0.8, transform=transform)  # trained on another number of steps
    hits, reach = acceptance(module, batch, *matrices(), num)
    assert hits.shape == (23,)
    assert reach.shape == (23, num)
    seen = start = 0
    for length in batch.lengths:
        part = slice(start, start + length)
        ids, mask = batch.input_ids[part], batch.loss_mask[part]
        aux, last = batch.aux_hidden_states[part], batch.last_hidden_state[part]
        for row in range(length):
            steps = 0
            while steps < num and row + 2 + steps < length and mask[row + 1 : row + 3 + steps].all():
                steps += 1
            equal, overlaps = decoded_row(head, ids, aux, last, row, steps, transform) if steps else ([], [])
            assert hits[start + row] == [*equal, False].index(False)
            expected = torch.tensor(overlaps + [0.0] * (num - steps)).cumprod(0)
            torch.testing.assert_close(reach[start + row], expected, rtol=1e-4, atol=1e-6)
            seen += steps
        start += length
    assert seen > 20


@torch.no_grad()
def test_the_estimate_is_the_mean_over_rows_of_what_they_are_expected_to_accept():
    head, batch = make_head(), make_batch([13, 1, 9], seed=8)
    module = TTTModule(head, 4, 0.8)
    heldout = count_heldout(module, [batch], *matrices(), [2, 4])
    _, reach = acceptance(module, batch, *matrices(), 4)
    rows = batch.useful_rows(4).rows
    for num in (2, 4):
        whole = total(heldout[num].values())
        assert heldout[num].keys() == set(batch.sample_ids)
        assert whole.rows == len(rows)
        assert whole.acceptance_length_t1 == pytest.approx(1 + float(reach[rows, :num].sum(-1).mean()), rel=1e-5)
    assert (HeldoutCounts().acceptance_length, HeldoutCounts().acceptance_length_t1) == (1.0, 1.0)


def test_teacher_forced_rounds_are_those_of_greedy_decoding():
    #            u  A  B  C  D  e
    mask = [0, 1, 1, 1, 1, 1]
    hits = [2, 9, 0, 1, 9, 9]
    counts = teacher_forced_rounds(hits, mask, num_draft_tokens=3)
    # From row 0 (A is known) two drafts B, C and the bonus D; row 3 then drafts e.
    assert (counts.rounds, counts.accepted) == (2, 3)
    assert teacher_forced_rounds(hits, mask, num_draft_tokens=1).rounds == 3


def test_teacher_forced_rounds_start_every_answer_at_its_last_prompt_token():
    mask = [0, 1, 1, 0, 0, 1, 1, 1]
    counts = teacher_forced_rounds([0] * 8, mask, 3)
    assert (counts.rounds, counts.accepted, counts.acceptance_length) == (1 + 2, 0, 1.0)


def test_rounds_are_counted_by_where_they_begin():
    answer, prompt = [1] * 300, [0] * 400
    first = teacher_forced_rounds([1] * 2100, prompt + answer + prompt + answer + prompt + answer, 3)
    second = teacher_forced_rounds([0] * 2100, prompt + answer, 3)
    # Rounds of the first at rows 399, 401, ...: 57 below 512; those of the second one by one.
    assert first.by_position[0] == [57, 57]
    assert second.by_position == [[113, 0], [186, 0]]
    assert [sum(column) for column in zip(*first.by_position, strict=True)] == [first.rounds, first.accepted]
    parts = acceptance_by_position({3: {"a": first, "b": second}})
    assert list(parts) == [f"acceptance_length_3_from_{start}" for start in (0, 512, 1024, 2048)]
    assert parts["acceptance_length_3_from_0"] == 1 + 57 / (57 + 113)
    assert acceptance_by_position({3: {"a": teacher_forced_rounds([0] * 301, [0, *answer], 3)}}) == {}, (
        "one part is all"
    )


def test_training_tells_of_the_decoded_conversations_with_all_their_sequences_and_of_no_other(tmp_path):
    walks = {
        "s/a": {"rounds": 4, "accepted": 6, "rows": 10, "expected": 5.0},
        "s/a##2": {"rounds": 2, "accepted": 3, "rows": 5, "expected": 4.0},
        "s/a##11": {"rounds": 2, "accepted": 1, "rows": 5, "expected": 1.0},
        "s/b": {"rounds": 90, "accepted": 0, "rows": 90, "expected": 0.0},
    }
    (tmp_path / "heldout_walks.json").write_text(json.dumps({"3": walks}))
    greedy, drafts_not_drawn = (EvaluateConfig(num_draft_tokens=3, temperature=t) for t in (0.0, 1.0))
    sampled = EvaluateConfig(num_draft_tokens=3, temperature=1.0, draft_sampling=DraftSampling.sampled)
    assert acceptance_in_training(tmp_path, ["s/a", "s/c"], greedy) == {"walked_acceptance_length": 1 + 10 / 8}
    assert acceptance_in_training(tmp_path, ["s/a"], sampled) == {"estimated_acceptance_length_t1": 1 + 10 / 20}
    assert acceptance_in_training(tmp_path, ["s/c"], greedy) == {"walked_acceptance_length": None}
    assert acceptance_in_training(tmp_path, ["s/a"], drafts_not_drawn) == {"estimated_acceptance_length_t1": None}
    tree = EvaluateConfig(num_draft_tokens=3, tree_depth=2)
    assert acceptance_in_training(tmp_path, ["s/a"], tree) == {"walked_acceptance_length": None}
