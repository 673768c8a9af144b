"""The EAGLE-3 draft head (arXiv:2503.01840), in the forms that vLLM, SGLang and TensorRT-LLM serve.

Row r holds the state of position r and the embedding of token r+1, at rotary position r, and predicts token r+2:

    position   0  1  2  3  4
    token      u  v  A  B  <eot>
    row 1      state a_1, token A (x_2), rotary position 1 -> predicts B (x_3)

Sequences are laid end to end without a batch dimension: T rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding, rotate_half

from .config import DraftHeadConfig
from .vocabulary import VocabularyMap

# (layer index, queries [T, heads, D], keys [T, kv_heads, D], values [T, kv_heads, D]) -> [T, heads, D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]  # cosine and sine, [T, D] each, or fewer dimensions: the first ones are rotated
Projected = tuple[Tensor, Tensor, Tensor]  # what the embedding adds to layer 0's q, k and v, [T, heads*D] each


class Lookup(NamedTuple):
    """Embeddings that are not looked up yet: a kernel does it, and norms and joins them with the states."""

    tokens: Tensor  # int64 [T]
    matrix: Tensor  # [V, H]


EmbeddingInput = Tensor | Projected | Lookup  # [T, H], or as `DraftHead.project_embedding` or `lookup` give it


class PartialLinear(nn.Linear):
    """A linear map that also takes some of its input columns alone; the bias comes with the last of them."""

    def forward(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        return nn.functional.linear(x, self.weight[:, columns], self.bias if columns.stop is None else None)


class SelfAttention(nn.Module):
    """Projections of grouped-query attention; the keys it sees are the caller's business."""

    def __init__(self, config: DraftHeadConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size * (2 if layer == 0 else 1)
        of_queries, of_keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = PartialLinear(width, of_queries, bias=config.attention_bias)
        self.k_proj = PartialLinear(width, of_keys, bias=config.attention_bias)
        self.v_proj = PartialLinear(width, of_keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(of_queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attention: Attention,
        projected: Projected | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Attend from `rows` (all if None) to all rows; `projected` joins the projections of x, its last columns."""
        columns = slice(-x.shape[-1], None)
        inputs = (_rows(x, rows), x, x)
        q, k, v = (proj(i, columns) for proj, i in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True))
        if projected is not None:
            q, k, v = q + _rows(projected[0], rows), k + projected[1], v + projected[2]
        q, k, v = (values.unflatten(-1, (-1, self.head_dim)) for values in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotated(q, *(_rows(values, rows) for values in rotary)), _rotated(k, *rotary)
        return self.o_proj(attention(self.layer, q, k, v).flatten(-2))


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [T, heads, D] to their positions; dimensions beyond those of `cos` stay as they are."""
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([_rotated(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, which keeps these two for the backward pass and not silu(gate) next to them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad)


class MLP(nn.Module):
    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = GatedSiLU.apply(gate, up) if torch.is_grad_enabled() else nn.functional.silu(gate) * up
        return self.down_proj(gated)


class DraftLayer(nn.Module):
    """A decoder layer; the first one reads [norm(embedding), norm(state)]."""

    def __init__(self, config: DraftHeadConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps) if layer == 0 else None
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.norm_before_residual = config.norm_before_residual

    def forward(
        self, embedding: EmbeddingInput, state: Tensor, rotary: Rotary, attention: Attention, rows: Tensor | None = None
    ) -> Tensor:
        residual, projected = state, None
        if self.hidden_norm is not None and isinstance(embedding, Lookup):
            from ..kernels.decoding import join_inputs

            x = join_inputs(*embedding, state, self.input_layernorm, self.hidden_norm)
            residual = x[:, state.shape[-1] :] if self.norm_before_residual else state
        elif self.hidden_norm is not None:
            x = self.hidden_norm(state)
            residual = x if self.norm_before_residual else state
            if isinstance(embedding, Tensor):
                x = torch.cat([self.input_layernorm(embedding), x], dim=-1)
            else:
                projected = embedding
        else:
            x = self.input_layernorm(state)
        x = _rows(residual, rows) + self.self_attn(x, rotary, attention, projected, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class OutputHead(nn.Linear):
    """The map to logits, or to anything else that is made of states and its weight."""

    def forward(self, states: Any, reduce: Callable[[Any, Tensor], Any] | None = None) -> Any:
        """Return logits [T, Vd] of states [T, H], or reduce(states, weight): ZeRO-3 has the weight whole here only."""
        return super().forward(states) if reduce is None else reduce(states, self.weight)


def rotary_embedding(config: DraftHeadConfig) -> PhiRotaryEmbedding:
    """Return Llama's rotary embedding; Phi's is the same, and knows heads that rotate a part of their dimensions."""
    return PhiRotaryEmbedding(cast(PhiConfig, config.llama_config()))


class DraftHead(nn.Module):
    """The trained network: `fuse` once per position, then `step` per draft token, then `lm_head` on the normed state.

    The token embedding is the verifier's, unless the head's width is another: then it has its own.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DraftHeadConfig, vocabulary: VocabularyMap | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.own_embedding else None
        num_aux, width = len(config.aux_layers), config.verifier_hidden_size
        self.input_norm = nn.RMSNorm(num_aux * width, config.rms_norm_eps) if config.norm_before_fc else None
        norms = (nn.RMSNorm(width, config.rms_norm_eps) for _ in range(num_aux))
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.fc = nn.Linear(num_aux * width, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(DraftLayer(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.draft_vocab_size, bias=False)
        if vocabulary is None:
            assert config.draft_vocab_size == config.vocab_size, "a reduced vocabulary needs its map"
            num_tokens = config.vocab_size
            vocabulary = VocabularyMap(torch.zeros(num_tokens, dtype=torch.int64), torch.ones(num_tokens).bool())
        self.register_buffer("d2t", vocabulary.d2t, persistent=False)
        self.register_buffer("t2d", vocabulary.t2d, persistent=False)
        # In a tuple, so that a cast of the head to bf16 does not round the frequencies.
        self._rotary = (rotary_embedding(config),)

    @property
    def target_ids(self) -> Tensor:
        """Return the verifier's id of every draft token (int64 [Vd])."""
        return VocabularyMap(self.d2t, self.t2d).target_ids

    def rotary(self, positions: Tensor, like: Tensor) -> Rotary:
        """Return cosine and sine for rotary positions [T], in the dtype and on the device of `like`."""
        cos, sin = self._rotary[0].to(like.device)(like, positions[None])
        return cos[0], sin[0]

    def embed(self, tokens: Tensor, verifier_embedding: Tensor) -> Tensor:
        """Return the embeddings [T, H] of tokens [T]: the head's own, or rows of the verifier's [V, H]."""
        if self.embed_tokens is not None:
            return self.embed_tokens(tokens)
        return nn.functional.embedding(tokens, verifier_embedding)

    def lookup(self, tokens: Tensor, verifier_embedding: Tensor) -> Lookup:
        """Return what `embed` looks up, for `step` to look up."""
        return Lookup(tokens, verifier_embedding if self.embed_tokens is None else self.embed_tokens.weight)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Return the state fed at step 0 [T, H] from the verifier's aux states [T, A*H]."""
        return self.fc(self.fc_input(aux_hidden_states))

    def fc_input(self, aux_hidden_states: Tensor) -> Tensor:
        """Return what `fc` reads of the aux states [T, A*H]: they, or normed ones."""
        if self.input_norm is not None:
            aux_hidden_states = self.input_norm(aux_hidden_states)
        if self.fc_norm is not None:
            parts = aux_hidden_states.split(self.config.verifier_hidden_size, dim=-1)
            aux_hidden_states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return aux_hidden_states

    def project_embedding(self, embedding: Tensor) -> Projected:
        """Return what the embeddings [T, H] of tokens add to layer 0's projections, for `step`, at whichever step.

        Biases are not among it: they come with the states.
        """
        first: Any = self.layers[0]
        x, attention, columns = first.input_layernorm(embedding), first.self_attn, slice(embedding.shape[-1])
        return attention.q_proj(x, columns), attention.k_proj(x, columns), attention.v_proj(x, columns)

    def step(
        self, embedding: EmbeddingInput, state: Tensor, rotary: Rotary, attention: Attention, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one draft step on T rows.

        Args:
            embedding: of the token fed; as a `Lookup` on a GPU only.
            state: [T, H], `fuse` at step 0, the state of the step before after that.
            rotary: at the rows' positions.
            attention: joins these rows' queries with the keys they may see.
            rows: int64, those whose states are read; all if None. The others give keys and values only.

        Returns:
            The state to feed onward and the normed state that `lm_head` multiplies, [T, H] each, one and the same with
            EAGLE-3.1's `norm_output`.
        """
        *earlier, last = self.layers
        for layer in earlier:
            state = layer(embedding, state, rotary, attention)
        state = last(embedding, state, rotary, attention, rows)
        normed = self.norm(state)
        return (normed if self.config.norm_output else state), normed


def initialise(head: DraftHead, verifier_embedding: Tensor, verifier_lm_head: Tensor, seed: int) -> None:
    """Draw weights by seed; `lm_head` and an embedding of the head's own come from the verifier's [V, H]."""
    generator, width = torch.Generator().manual_seed(seed), head.config.hidden_size
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            elif name == "lm_head.weight":
                parameter.copy_(of_width(verifier_lm_head[head.target_ids.cpu()], width))
            elif name == "embed_tokens.weight":
                parameter.copy_(of_width(verifier_embedding, width))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)


def of_width(rows: Tensor, width: int) -> Tensor:
    """Return rows [n, H] in another width: along their leading principal directions, or with zeros added."""
    if width >= rows.shape[1]:
        return nn.functional.pad(rows, (0, width - rows.shape[1]))
    rows = rows.float()
    _, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    return rows @ directions[:, -width:]
