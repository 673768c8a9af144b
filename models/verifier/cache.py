"""The verifier with a static key-value cache: every token stands in a slot, and sees the slots that a mask allows.

Slot s of a sequence holds its position s, for everything that is committed. The tokens of a forward stand in the slots
after those, and are written over by the next one unless they were committed (docs/internals/speculative_loop.md):

    committed  <s> The cat      slots 0 1 2                positions 0 1 2
    fed        sat { on | . }   slots 3 4 5                positions 3 4 4
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels import run_on
from .config import longest_text
from .model import PER_TOKEN, Verifier, VerifierOutput

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_FEW = 32  # tokens of a sequence in one forward
_GROUPED = "sdpa_grouped"  # the name of `_attend` as an attention of transformers


@dataclass
class Tree:
    """The shape of B trees of N nodes and the root; parents come before their children."""

    parents: Tensor  # int64 [B, N], of nodes 1 to N
    depths: Tensor  # int64 [B, N + 1]
    ancestors: Tensor  # bool [B, N + 1, N + 1], itself included
    depth: int  # of the deepest node, at most


class _StaticLayer(CacheLayerMixin):
    """Keys and values [B, slots, heads, D] of one layer, which are views of its cache's; their memory is there."""

    def __init__(self, cache: SlotCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._cache, self._memory = cache, (keys, values)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [b, heads, n, D] to their slots; return those of all slots that are read."""
        keys, values = map(self._updated, self._memory, (key_states, value_states))
        return keys, values

    def _updated(self, memory: Tensor, new: Tensor) -> Tensor:
        cache = self._cache
        memory = memory[cache.sequences]
        memory[cache.rows.to(memory.device), cache.slots.to(memory.device)] = new.transpose(1, 2)
        return memory[:, : cache.num_read].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.num_read, 0

    def get_seq_length(self) -> int:
        """Return 0 for a prompt, else 1: positions are always given, and by this models know whether it is one."""
        return int(not self._cache.is_prompt)

    def get_max_length(self) -> int:
        return self._memory[0].shape[1]


class SlotCache(Cache):
    """A cache of B sequences with the memory for `num_slots` tokens each.

    Shapes, types and devices are taken from `like`, a cache of one sequence that the model has filled.
    """

    def __init__(self, like: DynamicCache, num_sequences: int, num_slots: int) -> None:
        layers: list[Any] = like.layers
        filled: list[Tensor] = [states for layer in layers for states in (layer.keys, layer.values)]
        shapes = [(states.shape[1], states.shape[3], states.dtype, states.device) for states in filled]
        self.tensors: list[Tensor] = []  # [layers' keys and values, B, slots, heads, D], one for each shape
        views = {}
        for shape, number in Counter(shapes).items():
            heads, head_dim, dtype, device = shape
            sizes = [number, num_sequences, num_slots, heads, head_dim]
            if by_head := not run_on(device):  # CPUs multiply what lies together, kernels move whole slots
                sizes[2:4] = heads, num_slots
            memory = torch.zeros(sizes, dtype=dtype, device=device)
            self.tensors.append(memory.transpose(2, 3) if by_head else memory)
            views[shape] = iter(self.tensors[-1])
        pairs = zip(shapes[::2], shapes[1::2], strict=True)
        super().__init__(layers=[_StaticLayer(self, next(views[key]), next(views[value])) for key, value in pairs])
        self.sequences = slice(None)  # that a forward is of
        self.rows = self.slots = torch.empty(0)  # [b, 1] and [b, n], where its tokens are written
        self.num_read, self.is_prompt = 0, True

    def move(self, sources: Tensor, targets: Tensor, kernels: bool = False) -> None:
        """Copy keys and values between slots [B, n] of each sequence, all at once.

        With `kernels`, on a GPU, the slots must be those of paths through trees.
        """
        for tensor in self.tensors:
            read, written = sources.to(tensor.device), targets.to(tensor.device)
            if kernels and run_on(tensor.device):
                from ..kernels.decoding import move_slots

                move_slots(tensor, read, written)
            else:
                rows = torch.arange(len(read), device=tensor.device)[:, None]
                tensor[:, rows, written] = tensor[:, rows, read]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend to a cache on a CPU: for few tokens by two products, of the queries that share keys together.

    torch's fused kernel takes up to twice as long for them, and transformers copies the keys for every query head.
    """
    (batch, num_heads, length, head_dim), (num_keys, value_dim) = query.shape, value.shape[2:]
    if attention_mask is None or length > _FEW or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = query * (options.get("scaling") or head_dim**-0.5), key.flatten(0, 1), value.flatten(0, 1)
    grouped = len(key), num_heads * batch // len(key) * length
    scores = torch.bmm(query.reshape(*grouped, head_dim), key.transpose(1, 2)).view(batch, -1, length, num_keys)
    mask = attention_mask[..., :num_keys]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    out = torch.bmm(scores.softmax(-1).view(*grouped, num_keys), value).view(batch, num_heads, length, value_dim)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, _attend)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)


class CachedVerifier:
    """A verifier whose forwards read and write a static cache; ValueError: a layer's past is no keys and values."""

    def __init__(self, verifier: Verifier, num_sequences: int) -> None:
        self.verifier, self.num_sequences, self.num_slots = verifier, num_sequences, 0
        config = verifier.model.config.get_text_config()
        self.context = longest_text(config)
        self._kinds = _attention_kinds(verifier)
        spans = {_SLIDING: "sliding_window", _CHUNKED: "attention_chunk_size"}
        self._spans = {kind: getattr(config, name, None) for kind, name in spans.items()}
        self._additive = config._attn_implementation == "eager"
        decoder = verifier.model.get_decoder()
        on_cpu = verifier.device.type == "cpu" and config._attn_implementation == "sdpa"
        if on_cpu and decoder._can_set_attn_implementation():
            decoder.set_attn_implementation(_GROUPED)
        self._like = DynamicCache()
        verifier.forward(torch.zeros(1, 1, dtype=torch.int64, device=verifier.device), past_key_values=self._like)
        self.cache = SlotCache(self._like, num_sequences, 0)

    def resize(self, num_slots: int, sequences: list[int] | None = None) -> None:
        """Keep the content of some sequences, which become the first ones, with memory for this many tokens each.

        None keeps all.
        """
        sequences = list(range(self.num_sequences)) if sequences is None else sequences
        old, self.num_slots, self.num_sequences = self.cache, round_up(num_slots), len(sequences)
        self.cache = SlotCache(self._like, self.num_sequences, self.num_slots)
        for new, tensor in zip(self.cache.tensors, old.tensors, strict=True):
            held = min(new.shape[2], tensor.shape[2])
            for place, sequence in enumerate(sequences):
                new[:, place, :held] = tensor[:, sequence, :held]

    def are_most(self, num_slots: int) -> bool:
        """Return whether these are most of the slots, so that to read all of them costs little more."""
        return 3 * num_slots > 2 * self.num_slots

    def copy(self, source: int, target: int, num_slots: int) -> None:
        """Copy the first slots of one sequence to another."""
        for tensor in self.cache.tensors:
            tensor[:, target, :num_slots] = tensor[:, source, :num_slots]

    def reserve(self, num_slots: int) -> bool:
        """Take memory for sequences of this many tokens; return whether it is new, and all content gone."""
        if num_slots <= self.num_slots:
            return False
        self.cache = SlotCache(self._like, 0, 0)  # the old one goes first
        self.num_slots = round_up(num_slots)
        self.cache = SlotCache(self._like, self.num_sequences, self.num_slots)
        return True

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        num_read: int,
        sequences: slice = slice(None),
        tree: Tree | None = None,
        is_prompt: bool = False,
        **arguments: Any,
    ) -> VerifierOutput:
        """Run the model on tokens [b, n] that stand in the slots after the `lengths` [b] committed ones.

        Args:
            num_read: slots that are read, at least those of the longest sequence with its new tokens; on a CPU all, if
                these are most of them, for what lies together is read faster.
            sequences: which b of the batch's.
            tree: that the tokens are the nodes of; None if each follows the one before it.
            is_prompt: nothing is committed yet.
        """
        if tokens.device.type == "cpu" and self.are_most(num_read):
            num_read = self.num_slots
        slots = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        positions = slots if tree is None else lengths[:, None] + tree.depths
        cache = self.cache
        cache.sequences, cache.slots, cache.num_read, cache.is_prompt = sequences, slots, num_read, is_prompt
        cache.rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        seen = visible(lengths, slots, num_read, tree.ancestors if tree else None)
        masks = self._masks(seen, lengths, positions, tree)
        context = {"position_ids": positions, "past_key_values": cache, "attention_mask": masks}
        return self.verifier.forward(tokens, **context, **arguments)

    def check(self, tokens: list[int], inputs: dict[str, Any] | None = None) -> None:
        """Check on a text, of three tokens at least, that it ends with the logits here that the model itself gives.

        All but its last two tokens are read as a prompt, and these as a tree, with a wrong token between them.
        ValueError: it does not, so that masks and positions mean something else to this model.
        """
        model, inputs = self.verifier.model, inputs or {}
        text = torch.tensor([tokens], device=self.verifier.device)
        whole = self.verifier.forward(text, use_cache=False, logits_to_keep=1, **inputs)
        expected = whole.logits[0, -1].float()
        logits = CachedVerifier(self.verifier, 1)._read_as_node(text, inputs).float()  # in memory of its own
        off = float((logits - expected).abs().mean() / expected.std())
        # In bfloat16 30 layers differ from themselves by 0.08 with more rows beside them; a wrong position gives 1.
        if not off < (1e-3 if model.dtype is torch.float32 else 0.2):
            raise ValueError(
                f"verifier.path {model.name_or_path!r}: {type(model).__name__} gives other logits with fledge's cache "
                f"than by itself {'for images ' if inputs else ''}(off by {off:.2g} of their deviation), so fledge "
                "cannot decode with it: evaluate it with evaluate.engine=server"
            )

    def _read_as_node(self, text: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the logits [V] at the end of a text [1, T] whose last token is read as a node of a tree."""
        length = text.shape[1] - 2
        self.reserve(length + 3)
        inputs = {name: x[:, :length] if name in PER_TOKEN else x for name, x in inputs.items()}
        self.forward(text[:, :-2], text.new_zeros(1), length, is_prompt=True, logits_to_keep=1, **inputs)
        fed = torch.cat([text[:, -2:-1], 1 - text[:, -1:].clamp(max=1), text[:, -1:]], 1)
        branches = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], device=text.device).bool()
        tree = Tree(text.new_zeros(1, 2), text.new_tensor([[0, 1, 1]]), branches, 1)
        return self.forward(fed, text.new_tensor([length]), length + 3, tree=tree).logits[0, -1]

    def _masks(self, seen: Tensor, lengths: Tensor, positions: Tensor, tree: Tree | None) -> Any:
        """Return the mask that the model takes: one, or one for each kind of attention that its layers have."""
        masks: dict[str, Tensor] = {}
        for kind in self._kinds:
            mask = seen
            if span := self._spans.get(kind):
                keys = torch.arange(seen.shape[-1], device=seen.device).expand(len(lengths), -1)
                if tree is not None:
                    fed = (keys - lengths[:, None]).clamp(0, positions.shape[1] - 1)
                    keys = torch.where(keys < lengths[:, None], keys, positions.gather(1, fed))
                keys, queries = keys[:, None], positions[:, :, None]
                mask = mask & (queries // span == keys // span if kind == _CHUNKED else keys > queries - span)
            masks[kind] = mask[:, None]
            if self._additive:
                zeros = torch.zeros_like(masks[kind], dtype=self.verifier.model.dtype)
                masks[kind] = zeros.masked_fill(~mask[:, None], torch.finfo(zeros.dtype).min)
        return masks if len(masks) > 1 else masks[self._kinds[0]]


def visible(lengths: Tensor, slots: Tensor, num_read: int, ancestors: Tensor | None) -> Tensor:
    """Return which slots [0, num_read) each new token sees: bool [b, n, num_read].

    Args:
        lengths: int64 [b], slots committed.
        slots: int64 [b, n], those of the new tokens.
        ancestors: bool [b, n, m], of the first m slots after the committed ones; None: all up to a token's own.
    """
    keys = torch.arange(num_read, device=slots.device)
    if ancestors is None:
        return keys <= slots[:, :, None]
    new = keys - lengths[:, None]
    fed = ancestors.gather(2, new.clamp(0, ancestors.shape[2] - 1)[:, None].expand(-1, ancestors.shape[1], -1))
    return (new < 0)[:, None] | (fed & (new < ancestors.shape[2])[:, None])


def round_up(number: int) -> int:
    """Return a number at most a quarter larger, of few (64, 128, 192, 256, 320, ...), for a graph serves but one."""
    step = max(64, 1 << max(0, number.bit_length() - 3))
    return -(-number // step) * step


def _attention_kinds(verifier: Verifier) -> list[str]:
    model = verifier.model
    config = model.config.get_text_config()
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [_SLIDING if slides else _FULL]))
    unknown = [kind for kind in kinds if kind not in (_FULL, _SLIDING, _CHUNKED)]
    if unknown or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"verifier.path {model.name_or_path!r}: {type(model).__name__} keeps a state that a rejected draft cannot "
            f"be taken out of ({', '.join(unknown) or 'recurrent'} layers): evaluate it with evaluate.engine=server"
        )
    return kinds
