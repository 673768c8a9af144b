"""A new head that is fitted to its verifier's states before the first step (`train.init=regression`).

Row r reads the verifier's aux states at position r and the embedding of token r+1, and is to predict token r+2, as the
verifier's final state at position r+1 does. A ridge regression of that state on the two gives `fc`, and what layer 0
has to add for the embedding. Its attention is made to bring that: the first query head of each group begins as its
keys, so that a row attends mostly to itself; values hold the embedding's part along its strongest directions, as many
as they have.

Texts repeat themselves. Where the token that is fed stood before at position m, row m has what followed it there: its
state is that of position m, its embedding that of token m+1. So the second query head of each group learns to look back
at such rows, by a short training of its queries and keys alone, on the dimensions that rotate slowest; the first head
keeps the others. A second regression, of what is left on what the second heads find, gives their part of `o_proj`. If
each query head has keys of its own, none looks back.

A last regression, on the MLP's random features, gives `down_proj`. Layers after the first begin as the identity.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conf.schema import HeadInit, TrainConfig
from ..models.head.config import DraftHeadConfig
from ..models.head.draft_head import DraftHead
from ..models.head.ttt_attention import SplitAttention
from .loss.rows import PackedBatch
from .ranks.group import sum_over_ranks

_ROWS_PER_FEATURE = 48
_PENALTY = 3e-3  # of the ridge regression, in mean squares of a feature
_OWN_SCORE = 11.5  # of a row's query with its own key; with 300 random ones 0.98 of its attention stays there
_STEPS = 600  # in which the second heads learn to look back
_RATE = 5.8  # of Adam then, for a weight; divided by how many weights a row has
_PIECE = 1024  # tokens of a text within which they look back then


def num_packs(config: DraftHeadConfig, batch_tokens: int) -> int:
    """Return how many packs a head is fitted to."""
    features = (len(config.aux_layers) + 1) * config.verifier_hidden_size
    return -(-_ROWS_PER_FEATURE * features // batch_tokens)


def check_form(options: TrainConfig, config: DraftHeadConfig) -> None:
    """Refuse a head of another width than its verifier: the verifier's states are no target for it."""
    if options.init is HeadInit.regression and config.hidden_size != config.verifier_hidden_size:
        raise ValueError(
            f"train.init=regression needs a head as wide as its verifier ({config.verifier_hidden_size}), got "
            f"draft.hidden_size={config.hidden_size}: leave it null, or set train.init=random"
        )


@torch.no_grad()
def fit_head(
    head: DraftHead,
    batches: Callable[[], Iterable[PackedBatch]],
    embedding: Tensor,
    num_per_step: int = 1,
    num_looking_back: int | None = None,
) -> None:
    """Fit a new head, in float32 as it is, to batches with states in float32, the same ones at each call.

    `embedding` [V, H] is the verifier's. Every rank gives its own batches, and gets the same weights. What looks back
    is trained on the first `num_looking_back` of them (None: all), `num_per_step` for a step; their states stay in
    memory.
    """
    first: Any = head.layers[0]
    width = head.config.hidden_size

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            rows = batch.useful_rows(1).rows
            aux = head.fc_input(batch.states[0])[rows]
            embedded = first.input_layernorm(head.embed(batch.input_ids[rows + 1], embedding).float())
            yield torch.cat([aux, embedded], -1), batch.states[1][rows + 1]

    weights, gram, square = _ridge(inputs())
    scale = square**0.5  # of the verifier's final states, an RMS
    of_aux, of_embedding = (weights / scale).split([len(weights) - width, width])
    head.norm.weight.fill_(scale)
    head.fc.weight.copy_(of_aux.T)
    if first.norm_before_residual:  # the state's part will have an RMS of 1
        part = gram[: len(of_aux), : len(of_aux)]
        of_embedding = of_embedding / ((of_aux * (part @ of_aux)).sum() / width) ** 0.5
    slow = _slow_dimensions(head)
    _bring_embedding(head, of_embedding, gram[-width:, -width:], slow)
    for layer in head.layers:
        cast(Any, layer).mlp.down_proj.weight.zero_()
    for layer in list(head.layers)[1:]:
        cast(Any, layer).self_attn.o_proj.weight.zero_()

    def left(linear: nn.Linear, columns: Tensor | slice) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            features, so_far = _features(head, batch, embedding, linear)
            yield features[:, columns], batch.states[1][batch.useful_rows(1).rows + 1] / scale - so_far

    def fit(linear: nn.Linear, columns: Tensor | slice = slice(None)) -> None:
        linear.weight[:, columns] = _ridge(left(linear, columns))[0].T

    if len(slow):
        _look_back(head, itertools.islice(batches(), num_looking_back), embedding, num_per_step, slow)
        columns = torch.arange(first.self_attn.o_proj.in_features, device=embedding.device)
        by_head = columns.view(head.config.num_key_value_heads, -1, head.config.head_dim)
        fit(first.self_attn.o_proj, by_head[:, 1].flatten())
    fit(first.mlp.down_proj)


def _ridge(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Regress targets [n, H] on features [n, F] over all ranks.

    Returns weights [F, H], the features' mean products [F, F], and the mean square of the targets.
    """
    gram, products, square, number = (cast(Any, 0.0) for _ in range(4))
    for features, targets in pairs:
        gram, products = gram + features.T @ features, products + features.T @ targets
        square, number = square + targets.square().sum(), number + targets.numel()
    sums = torch.stack([square, torch.full_like(square, number)])
    gram, products, (square, number) = map(sum_over_ranks, (gram, products, sums))
    penalty = _PENALTY * gram.diagonal().mean()
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram), device=gram.device), products)
    return weights, gram * (products.shape[1] / number), square / number


def _slow_dimensions(head: DraftHead) -> Tensor:
    """Return the half of a query's dimensions that rotate slowest, or not at all (int64).

    None, if each query head has keys of its own: no head looks back then.
    """
    config, weight = head.config, head.fc.weight
    _, sine = head.rotary(torch.ones(1, dtype=torch.int64, device=weight.device), weight)
    number = config.head_dim // 2 if config.num_attention_heads > config.num_key_value_heads else 0
    return nn.functional.pad(sine[0], (0, config.head_dim - len(sine[0]))).argsort()[:number]


def _bring_embedding(head: DraftHead, weights: Tensor, gram: Tensor, slow: Tensor) -> None:
    """Let layer 0 add embedding @ weights [H, H] to a row's state; `gram` [H, H] has the embeddings' mean products.

    Its queries leave the slow dimensions to the heads that look back.
    """
    config, attention = head.config, cast(Any, head.layers[0]).self_attn
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sharpness = (_OWN_SCORE / size**0.5 * (size / (size - len(slow)))) ** 0.5
    if config.qk_norm:
        attention.q_norm.weight.fill_(sharpness)
        attention.k_norm.weight.fill_(sharpness)
    else:
        attention.k_proj.weight.mul_(sharpness)
    key = attention.k_proj.weight.view(keys, size, -1)
    own = attention.q_proj.weight.view(keys, heads // keys, size, -1)[:, 0]
    own.copy_(key)
    own[:, slow] = 0
    rank = min(keys * size, config.hidden_size)
    directions = torch.linalg.eigh(weights.T @ gram @ weights)[1][:, -rank:]  # ascending
    values = weights @ directions  # [H, rank]
    balance = values.norm(dim=0).clamp(min=1e-12).sqrt()  # directions have a norm of 1
    attention.v_proj.weight[:, config.hidden_size :] = 0
    attention.v_proj.weight[:rank, : config.hidden_size] = (values / balance).T
    brought = nn.functional.pad(directions * balance, (0, keys * size - rank))
    out = weights.new_zeros(config.hidden_size, keys, heads // keys, size)
    out[:, :, 0] = brought.unflatten(1, (keys, size))
    attention.o_proj.weight.copy_(out.flatten(1))


def _look_back(
    head: DraftHead, batches: Iterable[PackedBatch], embedding: Tensor, num_per_step: int, slow: Tensor
) -> None:
    """Train the second query head of each group, and the slow dimensions of its keys, to find what comes next."""
    attention, width = cast(Any, head.layers[0]).self_attn, head.config.hidden_size
    trained = [attention.q_proj.weight, attention.k_proj.weight]
    parts = [torch.zeros_like(weight) for weight in trained]
    shape = head.config.num_key_value_heads, -1, head.config.head_dim, 2 * width
    (second, key), (of_second, of_key) = ((q.view(shape)[:, 1], k.view(shape)[:, 0]) for q, k in (trained, parts))
    of_second[:, slow] = 1
    of_key[:, slow, width:] = 1  # of the state alone
    second *= of_second
    key[:, slow, :width] = 0
    packs = itertools.cycle([list(_pieces(batch, head.fuse(batch.states[0]).bfloat16())) for batch in batches])
    rate = _RATE / (2 * width)
    optimizer = torch.optim.Adam(trained, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=_STEPS + 1, pct_start=0.1)
    for _ in range(_STEPS):
        for pieces in itertools.islice(packs, num_per_step):
            with torch.enable_grad():
                found = _found(head, pieces, embedding)
                (-(found + 1e-6).log().sum()).backward(inputs=trained)
        for weight, part in zip(trained, parts, strict=True):
            weight.grad = sum_over_ranks(cast(Tensor, weight.grad)) * part
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _pieces(batch: PackedBatch, states: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, positions and states of each piece of a text."""
    for document in zip(*(x.split(batch.lengths) for x in (batch.input_ids, batch.position, states)), strict=True):
        yield from zip(*(x.split(_PIECE) for x in document), strict=True)


def _found(head: DraftHead, pieces: list[tuple[Tensor, Tensor, Tensor]], embedding: Tensor) -> Tensor:
    """Return what share of its attention the second head of each group gives to rows that were fed the right token.

    Of all rows, [groups * rows] in all: 0 for those that see none, which then teach nothing.
    """
    first, keys, shares = cast(Any, head.layers[0]), head.config.num_key_value_heads, list[Tensor]()
    for tokens, positions, states in pieces:
        right = (tokens[1:-1] == tokens[2:, None]).tril()  # row i, which is fed token i+1, sees row m

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, right: Tensor = right) -> Tensor:
            scores = torch.einsum("igd,mgd->gim", q.unflatten(1, (keys, -1))[:, :, 1], k) * q.shape[-1] ** -0.5
            later = torch.ones_like(right).triu(1)
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            shares.append((weights * right).sum(-1).flatten())
            return torch.zeros_like(q)

        fed = first.input_layernorm(head.embed(tokens[1:-1], embedding).float())
        x = torch.cat([fed, first.hidden_norm(states[:-2].float())], -1)
        first.self_attn(x, head.rotary(positions[:-2], x), attend)
    return torch.cat(shares)


def _features(head: DraftHead, batch: PackedBatch, embedding: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return of layer 0 what one of its maps reads [n, F] and its output [n, H].

    Both are of the useful rows.
    """
    rows, first, features = batch.useful_rows(1), cast(Any, head.layers[0]), list[Tensor]()
    every_row = torch.arange(len(batch.input_ids), device=embedding.device)
    fed = head.embed(batch.input_ids[(every_row + 1).clamp(max=len(every_row) - 1)], embedding).float()
    state = head.fuse(batch.states[0])
    attention = SplitAttention(rows, head.config.num_layers, window=head.config.window).at(0)
    hook = linear.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    alone = head.config.num_layers == 1
    out = first(fed, state, head.rotary(batch.position, state), attention, rows.rows if alone else None)
    hook.remove()
    return (features[0], out) if alone else (features[0][rows.rows], out[rows.rows])
