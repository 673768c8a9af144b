"""Stored formats of hidden states: what float8 loses, and which last states are targets."""

import pytest
import torch
from builders import make_batch
from fledge.data_synthesis.store.state_format import FLOAT8, StateFormat, decode, encode_float8, target_positions
from fledge.train.loss.rows import find_useful_rows


def states(num_tokens: int = 500, layers: int = 3, width: int = 16) -> torch.Tensor:
    """Of all magnitudes, a few values far above the others, as in real verifiers."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_tokens, layers * width, generator=generator)
    values *= torch.logspace(-20, 20, num_tokens)[:, None]
    values[::7, 5] *= 1000
    return values


def test_float8_is_within_a_sixteenth_down_to_a_small_part_of_the_largest_of_token_and_layer():
    exact = states()
    encoded, scale = encode_float8(exact, 3)
    assert (encoded.dtype, scale.dtype, scale.shape) == (FLOAT8, torch.float32, (500, 3))
    again = decode(encoded, scale, torch.float32)
    largest = exact.unflatten(-1, (3, -1)).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
    error = (again - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, largest * 2**-17)).all()


def test_float8_decodes_to_the_same_values_in_every_dtype():
    encoded, scale = encode_float8(states(), 3)
    exact = decode(encoded, scale, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(decode(encoded.view(torch.uint8), scale, dtype).double(), exact)


def test_float8_keeps_zeros_and_the_largest_value_and_tells_what_is_not_finite():
    exact = torch.zeros(5, 4)
    exact[1, 0], exact[2, 1], exact[3, 2], exact[4] = 448.0, torch.inf, torch.nan, 1e-44
    again = decode(*encode_float8(exact, 2), torch.float32)
    assert torch.equal(again[:2], exact[:2])
    assert again[2, :2].isnan().all()
    assert torch.equal(again[2, 2:], exact[2, 2:])
    assert again[3, 2:].isnan().all()
    assert again[4].isfinite().all()


@pytest.mark.parametrize("form", [StateFormat(torch.bfloat16), StateFormat(FLOAT8), StateFormat(FLOAT8, True)])
def test_bytes_per_token_are_those_of_the_encoded_tensors(form):
    exact = states(100, 3, 16)
    kept = 40 if form.only_counted else 100
    parts = [*form.encode(exact, 3), *form.encode(exact[:kept, :16], 1)]
    size = sum(part.numel() * part.itemsize for part in parts if part is not None)
    assert size == 100 * form.bytes_per_token(3, 16, 0.4)


def test_target_positions_are_those_whose_distribution_a_useful_row_asks_for():
    batch = make_batch([9, 30, 1, 2, 17], seed=3)
    useful = find_useful_rows(batch.loss_mask, batch.lengths, 7)
    asked = torch.zeros_like(batch.loss_mask)
    for step, places in enumerate(useful.steps):
        asked[useful.rows[places] + 1 + step] = True
    found = torch.cat([target_positions(mask) for mask in batch.loss_mask.split(batch.lengths)])
    assert (asked & ~found).sum() == 0
    first = torch.cat([torch.arange(length) == 0 for length in batch.lengths])
    assert torch.equal(asked | (found & first), found)  # no row comes before a document's first token
