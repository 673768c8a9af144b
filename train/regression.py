"""A new head that is fitted to its verifier's states before the first step (`train.init=regression`).

Row r reads the verifier's aux states at position r and the embedding of token r+1, and is to predict token r+2, as the
verifier's final state at position r+1 does. A ridge regression of that state on the two gives `fc`, and what layer 0
has to add for the embedding. Its attention is made to bring that: the first query head of each group begins as its
keys, so that a row attends mostly to itself; values hold the embedding's part along its strongest directions, as many
as they have. A second regression, of what is left on the MLP's random features, gives `down_proj`. Layers after the
first begin as the identity.
"""

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
_OWN_SCORE = 11.5  # of a row's query with its own key; with a thousand random ones 0.98 of its attention stays there


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
def fit_head(head: DraftHead, batches: Callable[[], Iterable[PackedBatch]], embedding: Tensor) -> None:
    """Fit a new head, in float32 as it is, to batches with states in float32, the same ones at each call.

    `embedding` [V, H] is the verifier's. Every rank gives its own batches, and gets the same weights.
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
    _bring_embedding(head, of_embedding, gram[-width:, -width:])
    for layer in head.layers:
        cast(Any, layer).mlp.down_proj.weight.zero_()
    for layer in list(head.layers)[1:]:
        cast(Any, layer).self_attn.o_proj.weight.zero_()

    def left() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            features, so_far = _mlp_features(head, batch, embedding)
            yield features, batch.states[1][batch.useful_rows(1).rows + 1] / scale - so_far

    first.mlp.down_proj.weight.copy_(_ridge(left())[0].T)


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


def _bring_embedding(head: DraftHead, weights: Tensor, gram: Tensor) -> None:
    """Let layer 0 add embedding @ weights [H, H] to a row's state; `gram` [H, H] has the embeddings' mean products."""
    config, attention = head.config, cast(Any, head.layers[0]).self_attn
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sharpness = (_OWN_SCORE / size**0.5) ** 0.5
    if config.qk_norm:
        attention.q_norm.weight.fill_(sharpness)
        attention.k_norm.weight.fill_(sharpness)
    else:
        attention.k_proj.weight.mul_(sharpness)
    key = attention.k_proj.weight.view(keys, size, -1)
    attention.q_proj.weight.view(keys, heads // keys, size, -1)[:, 0] = key
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


def _mlp_features(head: DraftHead, batch: PackedBatch, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return of layer 0, whose MLP adds nothing, what its `down_proj` reads [n, F] and its output [n, H].

    Both are of the useful rows.
    """
    rows, first, features = batch.useful_rows(1), cast(Any, head.layers[0]), list[Tensor]()
    every_row = torch.arange(len(batch.input_ids), device=embedding.device)
    fed = head.embed(batch.input_ids[(every_row + 1).clamp(max=len(every_row) - 1)], embedding).float()
    state = head.fuse(batch.states[0])
    attention = SplitAttention(rows, head.config.num_layers, window=head.config.window).at(0)
    hook = first.mlp.down_proj.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    alone = head.config.num_layers == 1
    out = first(fed, state, head.rotary(batch.position, state), attention, rows.rows if alone else None)
    hook.remove()
    return (features[0], out) if alone else (features[0][rows.rows], out[rows.rows])
