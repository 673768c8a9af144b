"""The unroll and its loss, against the definition written out row by row."""

import pytest
import torch
from builders import make_batch, make_head, matrices
from fledge.models.verifier.config import LogitTransform
from fledge.train.loss.fused import SUMS
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import TTTModule, count_rows, find_targets, unroll
from one_sequence import OneSequence
from plain_ttt import counted_rows
from small_heads import FORMS


def states_of(head, batch, embedding, ttt_steps):
    return unroll(head, batch, batch.useful_rows(ttt_steps), embedding)


def num_counted(head, batch, lm_head, ttt_steps):
    rows = batch.useful_rows(ttt_steps)
    return count_rows(find_targets(head, batch, rows, lm_head, LogitTransform()), rows)


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def test_rows_of_the_worked_line_are_counted_as_written():
    loss_mask = torch.tensor([0, 0, 1, 1, 1]).bool()  # u v A B <eot>
    counted = counted_rows(loss_mask, torch.zeros(5, dtype=torch.long), 3)
    assert counted.tolist() == [
        [False, True, True, False, False],  # step 0: row 1 predicts B, row 2 predicts <eot>
        [False, True, False, False, False],  # step 1: row 1 predicts <eot>
        [False, False, False, False, False],
    ]


def test_answer_at_s_to_e_trains_rows_from_s_minus_1_to_e_minus_2_and_no_row_crosses_a_user_turn():
    #        u  A  B  C  e  u  u  D  E  e
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 1, 1]).bool()
    counted = counted_rows(mask, torch.zeros(10, dtype=torch.long), 4)
    rows = [step.nonzero().squeeze(1).tolist() for step in counted]
    assert rows == [[0, 1, 2, 6, 7], [0, 1, 6], [0], []]


def test_no_row_is_counted_across_documents():
    mask = torch.ones(6, dtype=torch.bool)
    counted = counted_rows(mask, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert [step.nonzero().squeeze(1).tolist() for step in counted] == [[0, 3], []]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fc_norm": False, "norm_output": False},
        {"fc_norm": False, "norm_output": False, "norm_before_residual": True},
        {"num_layers": 2},
        {"aux_layers": (0, 1, 2, 5, 6)},
        {"num_key_value_heads": 4},
        {"hidden_size": 24, "own_embedding": True},
        {"hidden_size": 48, "own_embedding": True},
        *({"rope_parameters": {"rope_theta": 500.0, **ROPE[kind]}} for kind in ROPE),
        *FORMS.values(),
    ],
    ids=[
        "eagle3_1",
        "eagle3",
        "norm_before_residual",
        "two_layers",
        "five_aux_states",
        "no_gqa",
        "narrow",
        "wide",
        *ROPE,
        *FORMS,
    ],
)
def test_ttt_step_k_gives_the_logits_of_cached_decoding_at_draft_token_k(changes):
    head = make_head(**changes).double()
    batch = make_batch([23], aux=len(head.config.aux_layers), dtype=torch.float64)
    batch.loss_mask[:] = True
    embedding = matrices()[0].double()
    ttt_steps, row = 5, 11
    decoder = OneSequence(head, embedding)
    with torch.no_grad():
        trained = [head.lm_head(normed) for normed in states_of(head, batch, embedding, ttt_steps)]
        # Serve as an engine does: several rows at once, tokens drafted and discarded in between.
        for first, last in ((0, 5), (5, 6), (6, row + 1)):
            decoder.extend(batch.input_ids[first + 1 : last + 1].tolist(), batch.aux_hidden_states[first:last])
            decoder.propose()
        decoder.num_rows -= row + 1 - 9  # the last extension again, after drafts have overwritten the cache
        decoder.extend(batch.input_ids[10 : row + 2].tolist(), batch.aux_hidden_states[9 : row + 1])
        for step in range(ttt_steps):
            if step:
                decoder.feed(int(batch.input_ids[row + 1 + step]), step)
            torch.testing.assert_close(decoder.logits(), trained[step][row], rtol=1e-9, atol=1e-9)


def naive_loss(head, batch, embedding, lm_head, ttt_steps, gamma):
    """DESIGN's table, one row at a time, with the head's own decoder."""
    sums = [[] for _ in range(ttt_steps)]
    start = 0
    for length in batch.lengths:
        ids, mask = batch.input_ids[start : start + length], batch.loss_mask[start : start + length]
        aux, last = batch.aux_hidden_states[start : start + length], batch.last_hidden_state[start : start + length]
        start += length
        for row in range(length - 1):
            decoder = OneSequence(head, embedding)
            decoder.extend(ids[1 : row + 2].tolist(), aux[: row + 1])
            for step in range(ttt_steps):
                if row + 2 + step >= length or not mask[row + 1 : row + 3 + step].all():
                    break
                if step:
                    decoder.feed(int(ids[row + 1 + step]), step)
                p_full = (last[row + 1 + step] @ lm_head.T).softmax(-1)
                if not head.t2d[p_full.argmax()]:
                    continue
                p = p_full[head.target_ids]
                p = p / p.sum()
                log_q = decoder.logits().log_softmax(-1)
                sums[step].append((p * (p.log() - log_q)).sum())
    return sum(gamma**k * torch.stack(rows).mean() for k, rows in enumerate(sums) if rows)


@pytest.mark.parametrize("draft_vocab_size", [100, None])
def test_loss_equals_the_definition_row_by_row(draft_vocab_size):
    head = make_head(draft_vocab_size=draft_vocab_size)
    batch = make_batch([17, 1, 2, 9], seed=3)
    embedding, lm_head = matrices()
    loss, sums = TTTModule(head, 4, 0.8)(batch, embedding, lm_head)
    expected = naive_loss(head, batch, embedding, lm_head, 4, 0.8)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums[:, SUMS.index("counted")], num_counted(head, batch, lm_head, 4))


@pytest.mark.parametrize("changes", [{}, *FORMS.values()], ids=["eagle3_1", *FORMS])
def test_packed_documents_give_the_sums_and_gradients_of_documents_alone(changes):
    head = make_head(**changes).double()
    embedding, lm_head = (matrix.double() for matrix in matrices())
    module = TTTModule(head, 3, 0.8)
    packed = make_batch([12, 7, 15], seed=5, aux=len(head.config.aux_layers), dtype=torch.float64)
    num = num_counted(head, packed, lm_head, 3)
    module(packed, embedding, lm_head, num_counted=num)[0].backward()
    together = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    start = 0
    for length in packed.lengths:
        part = slice(start, start + length)
        alone = PackedBatch(
            packed.input_ids[part],
            packed.loss_mask[part],
            torch.zeros(length, dtype=torch.long),
            torch.arange(length),
            packed.aux_hidden_states[part],
            packed.last_hidden_state[part],
            [length],
            ["x"],
        )
        module(alone, embedding, lm_head, num_counted=num)[0].backward()
        start += length
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-9, atol=1e-9)


def test_a_batch_without_counted_rows_has_zero_loss_and_finite_gradients():
    head = make_head()
    batch = make_batch([6])
    batch.loss_mask[:] = False
    embedding, lm_head = matrices()
    loss, _ = TTTModule(head, 3, 0.8)(batch, embedding, lm_head)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())


def test_overlap_is_the_sum_of_minima_with_the_verifiers_own_probabilities():
    head = make_head()
    batch = make_batch([14], seed=2)
    batch.loss_mask[:] = True
    embedding, lm_head = matrices()
    _, sums = TTTModule(head, 1, 1.0)(batch, embedding, lm_head)
    (normed,) = states_of(head, batch, embedding, 1)
    p = (batch.last_hidden_state @ lm_head.T).softmax(-1)
    q = head.lm_head(normed).softmax(-1)
    rows = [r for r in range(12) if head.t2d[p[r + 1].argmax()]]
    expected = sum(torch.minimum(p[r + 1][head.target_ids], q[r]).sum() for r in rows)
    torch.testing.assert_close(sums[0, SUMS.index("overlap")], expected.detach(), rtol=1e-5, atol=1e-5)


def test_prefix_agreement_ends_at_a_target_outside_the_draft_vocabulary():
    head = make_head(draft_vocab_size=60)
    batch = make_batch([40], seed=6)
    batch.loss_mask[:] = True
    embedding, lm_head = matrices()
    _, sums = TTTModule(head, 3, 1.0)(batch, embedding, lm_head)
    with torch.no_grad():
        proposed = [head.target_ids[head.lm_head(n).argmax(-1)] for n in states_of(head, batch, embedding, 3)]
        top = (batch.last_hidden_state @ lm_head.T).argmax(-1)
        hits = [[bool(proposed[k][r] == top[r + 1 + k]) for r in range(40 - 2 - k)] for k in range(3)]
    expected = [sum(all(hits[j][r] for j in range(k + 1)) for r in range(len(hits[k]))) for k in range(3)]
    assert sums[:, SUMS.index("prefix_agreement")].tolist() == expected
