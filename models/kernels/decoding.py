"""What a round of speculative decoding does besides matrix products and attention, in Triton.

A launch each, in place of the many small ones of the plain twins: `DraftLayer` of models/head, `accepted_path` and
`SlotCache.move` of eval/decoding. No values are looked at on the host, and all launches depend on shapes alone, so that
a CUDA graph can hold them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# -- the draft step's input --------------------------------------------------------------------------------------------


@triton.jit
def _store_normed(source, weight, target, num_columns, eps, block: tl.constexpr):
    """Write the RMS norm of one row, rounded once, as torch does."""
    column = tl.arange(0, block)
    inside = column < num_columns
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    normed = x * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + column, normed.to(target.dtype.element_ty), mask=inside)


@triton.jit
def join_kernel(
    tokens, embedding, state, embedding_weight, state_weight, joined, num_columns, embedding_eps, state_eps,
    block: tl.constexpr,
):  # fmt: skip
    """Do one half of a row: its token's embedding (0) or its state (1)."""
    row = tl.program_id(0).to(tl.int64)
    target = joined + row * 2 * num_columns
    if tl.program_id(1) == 0:
        source = embedding + tl.load(tokens + row) * num_columns
        _store_normed(source, embedding_weight, target, num_columns, embedding_eps, block)
    else:
        _store_normed(state + row * num_columns, state_weight, target + num_columns, num_columns, state_eps, block)


JOIN_NUM_WARPS = 8


def join_inputs(
    tokens: Tensor, embedding: Tensor, state: Tensor, embedding_norm: torch.nn.RMSNorm, state_norm: torch.nn.RMSNorm
) -> Tensor:
    """Return [norm(embedding), norm(state)], [T, 2H], of tokens int64 [T], rows of [V, H], and states [T, H]."""
    assert embedding.is_contiguous()
    num_columns = state.shape[1]
    joined = state.new_empty(len(state), 2 * num_columns)
    weights = embedding_norm.weight, state_norm.weight
    with torch.cuda.device_of(state):
        join_kernel[(len(state), 2)](
            tokens.contiguous(), embedding, state.contiguous(), *weights, joined,
            num_columns, embedding_norm.eps, state_norm.eps,
            block=triton.next_power_of_2(num_columns), num_warps=JOIN_NUM_WARPS,
        )  # fmt: skip
    return joined


# -- the way through a proposal ----------------------------------------------------------------------------------------


@triton.jit
def way_kernel(
    tokens, parents, choices, nodes, chosen, accepted, num_tokens, num_steps, chain: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Walk through one sequence's chain or tree of `num_tokens` nodes, `num_steps` down at most."""
    sequence = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < num_tokens
    proposed = tl.load(tokens + sequence * num_tokens + place, mask=inside, other=0)
    if chain:
        parent = place.to(tl.int64)
    else:
        parent = tl.load(parents + sequence * num_tokens + place, mask=inside, other=0)
    choices += sequence * (num_tokens + 1)
    nodes += sequence * (num_steps + 1)
    chosen += sequence * (num_steps + 1)
    node = tl.zeros([], tl.int32)
    count = tl.zeros([], tl.int32)
    choice = tl.load(choices)
    tl.store(nodes, node.to(tl.int64))
    tl.store(chosen, choice)
    for step in range(1, num_steps + 1):
        fits = inside & (parent == node) & (proposed == choice)
        child = tl.min(tl.where(fits, place + 1, block + 1), 0)  # of equal children the first
        # Where the way has ended no child fits any more: node and choice stay as they are.
        goes_on = child <= block
        node = tl.where(goes_on, child, node)
        count += goes_on.to(tl.int32)
        choice = tl.load(choices + node)
        tl.store(nodes + step, node.to(tl.int64))
        tl.store(chosen + step, choice)
    tl.store(accepted + sequence, count.to(tl.int64))


WAY_NUM_WARPS = 1


def accepted_path(tokens: Tensor, parents: Tensor | None, choices: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give nodes, tokens [B, depth + 1] and the number accepted [B] of an `AcceptedPath`, int64.

    Args:
        tokens, parents: [B, N], of a tree's nodes; of a chain no parents.
        choices: [B, N + 1], the token chosen after each node.
        depth: of the deepest node, at most.
    """
    num_sequences, num_tokens = tokens.shape
    nodes, chosen = choices.new_empty(2, num_sequences, depth + 1)
    accepted = choices.new_empty(num_sequences)
    tokens, choices = tokens.contiguous(), choices.contiguous()
    of_tree = tokens if parents is None else parents.contiguous()
    with torch.cuda.device_of(choices):
        way_kernel[(num_sequences,)](
            tokens, of_tree, choices, nodes, chosen, accepted, num_tokens, depth,
            chain=parents is None, block=triton.next_power_of_2(max(1, num_tokens)), num_warps=WAY_NUM_WARPS,
        )  # fmt: skip
    return nodes, chosen, accepted


# -- the cache after a tree --------------------------------------------------------------------------------------------


@triton.jit
def move_kernel(
    held, sources, targets, num_sequences, num_slots, num_moved, num_columns, block: tl.constexpr
):  # fmt: skip
    """Move a block of columns of one sequence's keys or values, slot after slot."""
    row = tl.program_id(0).to(tl.int64)  # of [members, B]
    sequence = row % num_sequences
    column = tl.program_id(1) * block + tl.arange(0, block)
    held += row * num_slots * num_columns + column
    for number in range(num_moved):
        source = tl.load(sources + sequence * num_moved + number)
        target = tl.load(targets + sequence * num_moved + number)
        moved = (column < num_columns) & (source != target)
        values = tl.load(held + source * num_columns, mask=moved, other=0.0)
        tl.store(held + target * num_columns, values, mask=moved)


MOVE_BLOCK, MOVE_NUM_WARPS = 1024, 4


def move_slots(held: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Bring slots of a cache together in place, as if all at once: int64 [B, n], `sources` to `targets`.

    One slot is copied after the other, which is the same: no slot is read after it was written. With the way's node
    n_j at depth j, sources[j] = length + n_j and targets[j] = length + j. On the way n_j' > n_j for j' > j, and so
    n_j >= j: what j' reads, length + n_j' >= length + j' > length + j, is nothing that an earlier j has written. Beyond
    its end the last node n is read again, and slot length + n has been written by none but j = n, beyond the end or at
    it, from itself. No thread waits for another, for each moves columns of its own.

    Args:
        held: [members, B, slots, heads, D], contiguous.
    """
    assert held.is_contiguous()
    members, num_sequences, num_slots, heads, head_dim = held.shape
    num_columns = heads * head_dim
    grid = members * num_sequences, triton.cdiv(num_columns, MOVE_BLOCK)
    with torch.cuda.device_of(held):
        move_kernel[grid](
            held, sources.contiguous(), targets.contiguous(), num_sequences, num_slots, sources.shape[1], num_columns,
            block=MOVE_BLOCK, num_warps=MOVE_NUM_WARPS,
        )  # fmt: skip
