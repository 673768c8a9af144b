"""Cached decoding with a draft head: what the serving engines do with it, for B sequences at a time."""

import torch
from torch import Tensor, nn

from ...models.head.draft_head import DraftHead
from ...models.kernels import run_on
from ...models.verifier.cache import round_up, visible
from .acceptance import GREEDY, AcceptanceRule
from .proposal import Drafter, NewRows, Proposal, grow_tree


class DraftDecoder(Drafter):
    """Proposes tokens with a draft head and its key-value cache: a chain, or a tree as EAGLE-2 grows it.

    Row r of the cache is fed token r+1 with the state of position r. `extend` adds rows from the verifier's states;
    rows that `propose` adds after them from the head's own states are written over by the next `extend`.

    A tree (arXiv:2406.16858, docs/internals/speculative_loop.md): at each depth the `tree_top_k` best nodes are fed,
    and have `tree_top_k` children each; of all of them the best `num_draft_tokens` are proposed.

    `embedding` is the verifier's [V, H]; a `tree_depth` of None drafts a chain.
    """

    on_device = True

    def __init__(
        self,
        head: DraftHead,
        embedding: Tensor,
        num_draft_tokens: int,
        tree_depth: int | None = None,
        tree_top_k: int = 8,
        rule: AcceptanceRule = GREEDY,
        num_sequences: int = 1,
    ) -> None:
        if tree_depth is not None and tree_top_k > head.config.draft_vocab_size:
            raise ValueError(
                f"evaluate.tree_top_k must be at most the head's draft vocabulary of {head.config.draft_vocab_size}, "
                f"got {tree_top_k}"
            )
        self.head = head.eval().requires_grad_(False)
        self.embedding, self.rule = embedding, rule
        self.num_draft_tokens, self.tree_depth, self.tree_top_k = num_draft_tokens, tree_depth, tree_top_k
        self.depth, self.draws_tokens = tree_depth or num_draft_tokens, rule.draws_drafts
        self.num_draft_rows = num_draft_tokens if tree_depth is None else tree_depth * tree_top_k
        self._target_ids = head.target_ids
        self._kernels = "join" in rule.kernels and run_on(embedding.device)
        # What comes out of the last row: what is fed onward, and what lm_head multiplies.
        self._state, self._normed = embedding.new_zeros(2, num_sequences, head.config.hidden_size)
        self._last = torch.zeros(num_sequences, dtype=torch.int64, device=embedding.device)  # that row
        self.num_slots = 0
        self.reserve(64)

    def reserve(self, num_slots: int) -> bool:
        """Take memory for sequences of this many rows; return whether it is new, and all content gone."""
        if num_slots <= self.num_slots:
            return False
        config, like = self.head.config, self.embedding
        self.num_slots = round_up(num_slots)
        shape = (len(self._last), self.num_slots, config.num_key_value_heads, config.head_dim)
        self._cache = like.new_zeros(config.num_layers, 2, *shape)
        self._positions = torch.zeros(shape[:2], dtype=torch.int64, device=like.device)  # of what slots hold
        self._rotary = self.head.rotary(torch.arange(self.num_slots, device=like.device), like)
        return True

    @torch.no_grad()
    def extend(self, rows: NewRows, aux_hidden_states: Tensor) -> None:
        """Add rows of the verifier's states [b, n, A*H] and the tokens that came next."""
        fed, lengths, counts, num_read, sequences = rows
        slots = lengths[:, None] + torch.arange(fed.shape[1], device=fed.device)
        seen = visible(lengths, slots, num_read, None)
        state, normed = self._run(fed, self.head.fuse(aux_hidden_states), slots, slots, seen, sequences)
        each = torch.arange(len(fed), device=fed.device)
        self._state[sequences] = state[each, counts - 1]
        self._normed[sequences] = normed[each, counts - 1]
        self._last[sequences] = lengths + counts - 1

    @torch.no_grad()
    def propose(self, draws: Tensor, num_read: int) -> Proposal:
        """Propose tokens after the last row of every sequence."""
        return self._propose_chain(draws, num_read) if self.tree_depth is None else self._propose_tree(num_read)

    def _propose_chain(self, draws: Tensor, num_read: int) -> Proposal:
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        state, normed = self._state, self._normed
        for step in range(self.num_draft_tokens):
            if step:
                state, normed = self.feed(tokens[-1], state, step, num_read)
            token, probabilities = self.rule.draft(self.head.lm_head(normed), draws[:, step])
            tokens.append(self._target_ids[token])
            if probabilities is not None:
                distributions.append(probabilities)
        spread = self._of_verifiers_vocabulary(torch.stack(distributions, 1)) if distributions else None
        return Proposal(torch.stack(tokens, 1), probabilities=spread)

    def feed(self, tokens: Tensor, state: Tensor, step: int, num_read: int) -> tuple[Tensor, Tensor]:
        """Run draft step k >= 1 of a chain: feed tokens [B] with the head's own states [B, H], at position r + k."""
        slots = (self._last + step)[:, None]
        seen = visible(self._last, slots, num_read, None)
        state, normed = self._run(tokens[:, None], state[:, None], slots, slots, seen, slice(None))
        return state[:, 0], normed[:, 0]

    def _best_tokens(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and the tokens of the `tree_top_k` best children."""
        best = self.head.lm_head(normed).float().log_softmax(-1).topk(self.tree_top_k)
        return best.values, self._target_ids[best.indices]

    def _propose_tree(self, num_read: int) -> Proposal:
        assert self.tree_depth is not None
        width, first = self.tree_top_k, self._last + 1
        scores, tokens = self._best_tokens(self._normed)  # [B, width] of the nodes that are fed next
        levels = [(scores, tokens, torch.full_like(tokens, -1))]  # and the candidates' parents
        states = self._state[:, None].expand(-1, width, -1)
        nodes = torch.arange(width, device=tokens.device).expand_as(tokens)  # the candidates that are fed next
        ancestors = torch.zeros(*tokens.shape, 0, dtype=torch.bool, device=tokens.device)  # [B, width, rows fed]
        itself = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(*tokens.shape, -1)
        for depth in range(1, self.tree_depth):
            ancestors = torch.cat([ancestors, itself], 2)
            slots = first[:, None] + torch.arange((depth - 1) * width, depth * width, device=tokens.device)
            positions = (self._last + depth)[:, None].expand(-1, width)
            seen = visible(first, slots, num_read, ancestors)
            states, normed = self._run(tokens, states, slots, positions, seen, slice(None))
            more, children = self._best_tokens(normed)  # [B, width, width]
            child_scores, children = (scores[:, :, None] + more).flatten(1), children.flatten(1)
            levels.append((child_scores, children, nodes.repeat_interleave(width, 1)))
            chosen = child_scores.topk(width)
            scores, tokens = chosen.values, children.gather(1, chosen.indices)
            nodes = width + (depth - 1) * width * width + chosen.indices
            parent = (chosen.indices // width)[:, :, None]
            states = states.gather(1, parent.expand_as(states))
            ancestors = ancestors.gather(1, parent.expand_as(ancestors))
        scores, tokens, parents = (torch.cat(values, 1) for values in zip(*levels, strict=True))
        return Proposal(*grow_tree(scores, tokens, parents, self.num_draft_tokens, self.tree_depth))

    def _run(
        self, tokens: Tensor, state: Tensor, slots: Tensor, positions: Tensor, seen: Tensor, sequences: slice
    ) -> tuple[Tensor, Tensor]:
        """Run tokens [b, n] with states [b, n, H] in slots of the cache; return the states that `step` does."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        masks, num_read = self._masks(seen, rows, slots, positions, sequences), seen.shape[-1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (values.unflatten(0, tokens.shape) for values in (q, k, v))
            keys, values = self._cache[layer, :, sequences]
            keys[rows, slots], values[rows, slots] = k, v
            q, k, v = (states.transpose(1, 2) for states in (q, keys[:, :num_read], values[:, :num_read]))
            if q.is_cuda:  # for which torch has no fast kernel for grouped queries with a mask
                k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks[layer], enable_gqa=not q.is_cuda)
            return out.transpose(1, 2).flatten(0, 1)

        cos, sin = (table[positions.flatten()] for table in self._rotary)
        looked_up = self.head.lookup if self._kernels else self.head.embed
        embedding = looked_up(tokens.flatten(), self.embedding)
        outputs = self.head.step(embedding, state.flatten(0, 1), (cos, sin), attend)
        after, normed = (values.unflatten(0, tokens.shape) for values in outputs)
        return after, normed

    def _masks(self, seen: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, sequences: slice) -> list[Tensor]:
        """Return each layer's mask [b, 1, n, slots read]: of the slots seen, those within its window of positions."""
        config = self.head.config
        masks: dict[int | None, Tensor] = {None: seen[:, None]}
        if window := config.sliding_window:
            held = self._positions[sequences]
            held[rows, slots] = positions
            near = held[:, None, : seen.shape[-1]] > positions[:, :, None] - window
            masks[window] = (seen & near)[:, None]
        return [masks[config.window(layer)] for layer in range(config.num_layers)]

    def _of_verifiers_vocabulary(self, probabilities: Tensor) -> Tensor:
        """Spread probabilities [..., Vd] over the verifier's tokens [..., V]."""
        spread = probabilities.new_zeros(*probabilities.shape[:-1], len(self.head.t2d))
        return spread.index_copy_(-1, self._target_ids, probabilities)
