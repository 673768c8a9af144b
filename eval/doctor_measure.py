"""Which form a head's weights were trained for, measured: the same weights under a few configurations.

It tells what the texts tell: a head hardly trained, or asked what it never saw, gains the same under several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conf.schema import Config
from ..data_synthesis.chat import prompt_tokens
from ..models.draft_head import DraftHead, DraftHeadConfig
from ..models.embedded.corpus import questions as embedded_questions
from ..models.foreign_head import EMBEDDING, LM_HEAD, assemble_head
from ..models.formats import vllm_layer_ids
from ..models.ttt_attention import TTTAttention
from ..models.verifier import Verifier
from ..models.vocabulary import VocabularyMap
from .doctor_rules import IDS, KNOWN, NESTED, TOP, Published, absolute_ids
from .prompt_lookup import NoDraft
from .questions import load_questions
from .speculative import speculate

STEPS = 3
CONFIGURED = "as configured"


@dataclass(frozen=True)
class Variant:
    """A configuration under which the weights may have been trained, and the fields that declare it."""

    name: str
    config: DraftHeadConfig
    cure: str = ""


@dataclass(frozen=True)
class Measured:
    """What a head gained under a variant: over all rows from which decoding could start."""

    variant: Variant
    hits: Tensor  # bool [rows, STEPS]: the draft token is the verifier's

    @property
    def leading(self) -> Tensor:
        """Draft tokens that would be accepted from each row (float64 [rows])."""
        return self.hits.long().cumprod(dim=1).sum(dim=1).double()

    @property
    def first(self) -> float:
        """Share of rows whose first draft token is the verifier's."""
        return float(self.hits[:, 0].double().mean())

    @property
    def length(self) -> float:
        """Tokens gained in STEPS steps, the verifier's own included: 1 + mean accepted."""
        return 1 + float(self.leading.mean())

    def better_than(self, other: Measured, margin: float) -> bool:
        """Whether the length is larger by more than `margin`, and by two standard errors of the rows' differences."""
        gained = self.leading - other.leading
        error = float(gained.std(correction=0)) / len(gained) ** 0.5
        return float(gained.mean()) > max(margin, 2 * error)


@dataclass
class Text:
    """A prompt and the verifier's greedy answer to it."""

    tokens: list[int]
    start: int  # position of the answer's first token
    aux: dict[int, Tensor]  # layer -> [T, H]


def readable_head(head: Published, verifier_lm_head: Tensor) -> DraftHead:
    """Put the head together, with everything corrected whose cure leaves no choice.

    Raises:
        ValueError: what is wrong cannot be corrected without a choice.
    """
    tensors = _corrected_tensors(head, verifier_lm_head)
    values = _corrected_config(head, tensors)
    return assemble_head(head.folder, values, tensors, head.verifier, None).head


def _corrected_tensors(head: Published, verifier_lm_head: Tensor) -> dict[str, Tensor]:
    tensors = {name.removeprefix("model."): tensor for name, tensor in head.tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if KNOWN.fullmatch(name) and name != EMBEDDING}
    vocab_size = head.verifier.vocab_size
    if "d2t" not in tensors and "t2d" in tensors:
        inside = tensors["t2d"].bool().nonzero().flatten()
        tensors["d2t"] = inside - torch.arange(len(inside))
    if "d2t" in tensors:
        if absolute_ids(tensors, vocab_size):
            tensors["d2t"] = tensors["d2t"].long() - torch.arange(len(tensors["d2t"]))
        tensors.pop("t2d", None)  # it follows from d2t
        if len(tensors["d2t"]) == vocab_size:
            del tensors["d2t"]
    if LM_HEAD not in tensors:
        d2t = tensors.get("d2t")
        ids = torch.arange(vocab_size) if d2t is None else torch.arange(len(d2t)) + d2t
        if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            tensors[LM_HEAD] = verifier_lm_head[ids]
    return tensors


def _corrected_config(head: Published, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers, num_layers = head.aux_layers(), head.verifier.num_hidden_layers
    if not layers or not all(isinstance(k, int) and 0 <= k < num_layers for k in layers):
        layers = head.default_layers()
    layer = {name: value for name, value in head.layer.items() if name not in ("quantization_config", IDS)}
    if (rope := layer.get("rope_parameters")) and "rope_theta" in rope:
        layer["rope_theta"] = rope["rope_theta"]
    if head.speculators:
        values = {**head.values, "transformer_layer_config": layer, IDS: vllm_layer_ids(layers)}
        values.pop("eagle_config", None)
    else:
        values = {**layer, "eagle_config": {**(head.values.get("eagle_config") or {}), IDS: layers}}
    values.pop("quantization_config", None)
    values["draft_vocab_size"] = len(tensors[LM_HEAD]) if LM_HEAD in tensors else None
    values["fc_norm"] = any(name.startswith("fc_norm.") for name in tensors)
    return values


def variants(config: DraftHeadConfig, head: Published) -> list[Variant]:
    """Give the configurations to try, the head's own first."""
    tried = [Variant(CONFIGURED, config)]
    for shift in (1, -1):
        layers = tuple(k + shift for k in config.aux_layers)
        if min(layers) >= 0 and max(layers) < head.verifier.num_hidden_layers:
            ids = f"{TOP}: {vllm_layer_ids(layers)}"
            cure = ids if head.speculators else f"{NESTED}: {list(layers)} and {ids}"
            tried.append(Variant(f"aux ids {shift:+d}", replace(config, aux_layers=layers), cure))
    for name in ("norm_before_residual", "norm_output"):
        flipped = not getattr(config, name)
        changed = replace(config, **cast(dict[str, Any], {name: flipped}))
        tried.append(Variant(f"{name} {str(flipped).lower()}", changed, f"{name}: {str(flipped).lower()}"))
    theirs = getattr(head.verifier, "rope_parameters", None)
    if theirs and (rope := {"rope_type": "default", **theirs}) != config.rope_parameters:
        cure = f"rope_theta, rope_scaling and rope_parameters of the verifier: {theirs}"
        tried.append(Variant("rope of the verifier", replace(config, rope_parameters=rope), cure))
    return tried


def measure(config: Config, head: DraftHead, tried: list[Variant], embedding: Tensor) -> list[Measured]:
    """Let the verifier answer a few prompts and measure the head on the answers under each variant.

    Raises:
        ValueError: the answers are too short to measure on.
    """
    layers = sorted({layer for variant in tried for layer in variant.config.aux_layers})
    verifier = Verifier.load(config.verifier, layers)
    texts = [_answered(verifier, prompt, config.doctor.max_tokens) for prompt in _prompts(config, verifier)]
    dtype = getattr(torch, config.verifier.dtype.value)
    embedding = embedding.to(verifier.device, dtype)
    measured = []
    for variant in tried:
        formed = DraftHead(variant.config, VocabularyMap(head.d2t, head.t2d))
        formed.load_state_dict(head.state_dict())
        formed = formed.to(verifier.device, dtype).eval()
        hits = torch.cat([teacher_forced_hits(formed, text, embedding) for text in texts])
        if not len(hits):
            raise ValueError("the verifier's answers are too short to measure on: raise doctor.max_tokens")
        measured.append(Measured(variant, hits))
    return measured


def _prompts(config: Config, verifier: Verifier) -> list[list[int]]:
    if config.evaluate.questions is None:
        turns = [question["turns"][0] for question in embedded_questions()]
    else:
        turns = [question.turns[0] for question in load_questions(config.evaluate)]
    spread = max(1, len(turns) // config.doctor.num_prompts)  # over the categories
    chosen = turns[::spread][: config.doctor.num_prompts]
    return [prompt_tokens(verifier.tokenizer, [{"role": "user", "content": turn}]) for turn in chosen]


def _answered(verifier: Verifier, prompt: list[int], max_tokens: int) -> Text:
    tokens = prompt + speculate(verifier, NoDraft(), prompt, 1, max_tokens).tokens
    states = verifier.forward(torch.tensor([tokens], device=verifier.device)).aux_hidden_states[0]
    parts = states.chunk(len(verifier.aux_layers), dim=-1)
    return Text(tokens, len(prompt), dict(zip(verifier.aux_layers, parts, strict=True)))


@torch.no_grad()
def teacher_forced_hits(head: DraftHead, text: Text, embedding: Tensor) -> Tensor:
    """Tell where the head's greedy token is the verifier's (bool [rows, STEPS]).

    Rows are those from which decoding can start and that have a token of the answer to predict: for an answer at
    positions s ... e, rows s-1 ... e-2. A step beyond the answer's end is no hit.
    """
    num_tokens = len(text.tokens)
    tokens = torch.tensor(text.tokens, device=embedding.device)
    rows, positions = torch.arange(text.start - 1, num_tokens - 2), torch.arange(num_tokens)
    attention = TTTAttention([num_tokens], head.config.num_layers)
    state = head.fuse(torch.cat([text.aux[layer] for layer in head.config.aux_layers], dim=-1))
    hits = torch.zeros(len(rows), STEPS, dtype=torch.bool)
    for step in range(STEPS):
        fed = tokens[(positions + 1 + step).clamp(max=num_tokens - 1)]
        rotary = head.rotary((positions + step).to(state.device), state)
        state, normed = head.step(nn.functional.embedding(fed, embedding), state, rotary, attention)
        chosen = head.target_ids[head.lm_head(normed[rows]).argmax(-1)]
        targets = rows + 2 + step
        equal = chosen == tokens[targets.clamp(max=num_tokens - 1)]
        hits[:, step] = equal.cpu() & (targets < num_tokens)
    return hits
