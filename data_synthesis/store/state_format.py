"""How hidden states are stored: their number format, and the positions whose last state is kept.

float8: every token and layer has a scale s, a power of two, and the stored values times s are the states. So decoding
is exact in every format, and a value is off by at most 2^-4 of itself, down to 2^-13 of the largest next to it.

`counted`: training asks for the verifier's distribution at the positions of an answer but its last (train/loss/rows.py:
an answer at positions s ... e has the targets s ... e-1). With the prompt `u v` and the answer `A B <eot>`:

    position        0  1  2  3  4
    token           u  v  A  B  <eot>
    loss_mask       0  0  1  1  1
    state is kept         x  x
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
TOKEN_BYTES = 5  # of a token besides its states: its id and its place in the mask
_LARGEST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class StateFormat:
    """How the states of a store are written."""

    dtype: torch.dtype
    only_counted: bool = False  # last states: of target positions alone

    def bytes_per_token(self, num_layers: int, hidden_size: int, target_share: float) -> float:
        """Return the bytes that the states of a token take, scales included.

        `target_share` is that of positions whose last state is kept if `only_counted`.
        """
        state = hidden_size * self.dtype.itemsize + (4 if self.dtype == FLOAT8 else 0)
        return state * (num_layers + (target_share if self.only_counted else 1.0))

    def encode(self, states: Tensor, num_layers: int) -> tuple[Tensor, Tensor | None]:
        """Return states [T, A*H] in this format, and the scales [T, A] of float8."""
        return encode_float8(states, num_layers) if self.dtype == FLOAT8 else (states.to(self.dtype), None)


def encode_float8(states: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Return states [T, A*H] as float8_e4m3fn, and their scales, float32 [T, A]: NaN if a state is not finite."""
    by_layer = states.float().unflatten(-1, (num_layers, -1))
    largest = by_layer.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / _LARGEST)  # 1/2 <= mantissa < 1: the least power of two not below
    exponent = torch.where(largest > 0, exponent - (mantissa == 0.5).int(), 0).clamp(min=-126)
    scale = torch.where(largest.isfinite(), torch.exp2(exponent.float()), torch.nan)
    return (by_layer / scale[..., None]).to(FLOAT8).flatten(-2), scale


def decode(states: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return stored states [T, A*H] in a number format, on their device."""
    if scale is None:
        return states.to(dtype)
    by_layer = states.view(FLOAT8).to(dtype).unflatten(-1, (scale.shape[-1], -1))
    return (by_layer * scale[..., None].to(dtype)).flatten(-2)


def target_positions(loss_mask: Tensor) -> Tensor:
    """Return of every position of a sample whether its last state can be a target (bool [T])."""
    produced = loss_mask.bool()
    return produced & torch.cat([produced[1:], produced.new_zeros(1)])
