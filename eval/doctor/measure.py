"""Which form a head's weights were trained for, measured: the same weights under every plausible configuration.

A head is nearest to its verifier, by KL(p || q), in the form it was trained for. Forms are compared row by row on the
verifier's own greedy answers, teacher-forced, as in training; what the texts do not settle is called open.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...conf.schema import Config
from ...models.formats.published import halves_from_pairs
from ...models.formats.published_config import HeadFiles
from ...models.head.config import DraftHeadConfig, rope_of
from ...models.head.draft_head import DraftHead, DraftLayer, rotary_embedding
from ...models.head.ttt_attention import TTTAttention
from ...models.verifier.config import torch_device
from ...models.verifier.model import Verifier, free_memory
from ..decoding.speculator import answer_alone
from ..questions.question import load_questions
from ..questions.reader import QuestionReader, UnaskableError
from .rules import AUX, NORM_BEFORE_RESIDUAL, NORM_OUTPUT, PAIRS, ROPE, written_ids

CONFIGURED = "as configured"
PAIRS_CURE = (
    "import it with head_import.interleaved_rotary=true, which reorders q_proj and k_proj, and serve its export"
)
STEPS = 3
MIN_TEXTS = 4
FAR = 0.6  # first draft tokens that are the verifier's: if fewer in every form, the head is weak or in none of them
_FLIPS = ((), (NORM_OUTPUT,), (NORM_BEFORE_RESIDUAL,), (NORM_BEFORE_RESIDUAL, NORM_OUTPUT))
CLEAR = 4.0  # standard errors by which a form must be further from the verifier to be ruled out


@dataclass(frozen=True)
class Variant:
    """A form under which the weights may have been trained: what differs from the head as configured."""

    changes: tuple[str, ...]  # of AUX, NORM_BEFORE_RESIDUAL, NORM_OUTPUT, ROPE, PAIRS
    name: str
    config: DraftHeadConfig
    cure: str


@dataclass
class Text:
    """A prompt and the verifier's greedy answer to it."""

    tokens: list[int]
    start: int  # position of the answer's first token
    aux: dict[int, Tensor]  # layer -> [T, H]
    log_p: Tensor  # float32 [T - start, Vd], at the answer's positions: the verifier's, over the draft vocabulary


class Measured:
    """A variant on every text: rows from which decoding could start, STEPS draft steps each.

    Args:
        hits: by text, bool [rows, STEPS]: the draft token is the verifier's.
        nats: by text, [rows]: KL(p || q), summed over steps.
    """

    def __init__(self, variant: Variant, hits: list[Tensor], nats: list[Tensor]) -> None:
        self.variant, self.nats = variant, nats
        every = torch.cat(hits)
        self.first = float(every[:, 0].double().mean())  # share of rows whose first draft token is the verifier's
        # Tokens gained in STEPS steps, the verifier's own included.
        self.length = 1 + float(every.long().cumprod(dim=1).sum(dim=1).double().mean())
        self.loss = float(torch.cat(nats).mean())  # nats a row

    def clearly_further_than(self, other: Measured) -> bool:
        """Return whether this form is further from the verifier, by CLEAR standard errors (a text is one draw)."""
        sums = torch.stack([(a - b).double().sum() for a, b in zip(self.nats, other.nats, strict=True)])
        rows = torch.tensor([len(text) for text in self.nats], dtype=torch.float64)
        mean = sums.sum() / rows.sum()
        spread = (sums - mean * rows).square().sum() * len(rows) / (len(rows) - 1)
        return float(mean * rows.sum() / spread.sqrt().clamp(min=1e-9)) > CLEAR


class Verdict:
    """What the measurement tells."""

    def __init__(self, measured: list[Measured]) -> None:
        self.measured = sorted(measured, key=lambda one: one.loss)  # the form nearest to the verifier first
        self.configured = next(one for one in measured if not one.variant.changes)  # the head as it is
        # Forms that the texts do not tell from the nearest one, those of fewest changes first.
        alike = [one for one in self.measured if not one.clearly_further_than(self.measured[0])]
        self.alike = sorted(alike, key=lambda one: len(one.variant.changes))
        # Forms the weights may have been trained for: of those alike, the nearest to the head as configured.
        self.candidates = [m for m in self.alike if len(m.variant.changes) == len(self.alike[0].variant.changes)]
        self.as_configured = not self.alike[0].variant.changes  # nothing speaks against the head as it is
        # Whether they were trained for another form, in which they accept more.
        longer = all(one.length > self.configured.length for one in self.candidates)
        self.otherwise = not self.as_configured and longer
        self.best_first = max(one.first for one in measured)
        layers = {one.variant.config.aux_layers for one in self.candidates}
        self.aux_layers = list(layers.pop()) if len(layers) == 1 else None  # None: the texts do not tell

    def settles(self, change: str) -> bool:
        """Return whether the head as configured is right in this respect: all forms that differ in it are ruled out."""
        return self.as_configured and not any(change in one.variant.changes for one in self.alike)


def variants(head: HeadFiles, config: DraftHeadConfig) -> list[Variant]:
    """Return the forms to try: aux layers one up or down, both norm flags, the verifier's rope, in every combination.

    And, by itself, the rotation of Llama 4 and GPT-J: of neighbouring dimensions as pairs.
    """
    theirs = rope_of(head.verifier)
    ropes = [config.rope_parameters, *([theirs] if theirs != config.rope_parameters else [])]
    tried = []
    for shift, flips, rope in itertools.product((0, 1, -1), _FLIPS, ropes):
        layers = tuple(layer + shift for layer in config.aux_layers)
        if min(layers) < 0 or max(layers) >= head.verifier.num_hidden_layers:
            continue
        norms: dict[str, Any] = {name: not getattr(config, name) for name in flips}
        forms = [(AUX, f"aux layers {list(layers)}", ", ".join(written_ids(head, layers)))] if shift else []
        for name, value in norms.items():
            flag = f"{name}: {str(value).lower()}"
            forms.append((name, flag, flag))
        if rope is theirs:
            forms.append((ROPE, "rope of the verifier", f"rope_theta, rope_scaling and rope_parameters: {theirs}"))
        changes, names, cures = zip(*forms, strict=True) if forms else ((), (CONFIGURED,), ())
        formed = replace(config, aux_layers=layers, rope_parameters=rope, **norms)
        tried.append(Variant(changes, ", ".join(names), formed, ", ".join(cures)))
    if not head.options.interleaved_rotary and config.head_dim % 2 == 0:
        tried.append(Variant((PAIRS,), "rotary pairs (interleaved)", config, PAIRS_CURE))
    return tried


def measure(config: Config, head: DraftHead, tried: list[Variant], embedding: Tensor) -> Verdict:
    """Let the verifier answer a few prompts, and compare the forms of a head on them; `embedding` is its [V, H]."""
    layers = sorted({layer for variant in tried for layer in variant.config.aux_layers})
    texts = answers(config, layers, head.target_ids)
    if len(texts) < MIN_TEXTS:
        raise ValueError(
            f"{len(texts)} answers of the verifier are long enough to measure on, {MIN_TEXTS} are required: raise "
            "doctor.num_prompts or doctor.max_tokens, or give other prompts by evaluate.questions"
        )
    return compare(head, tried, texts, embedding, torch_device(config.verifier.device))


def answers(config: Config, layers: list[int], target_ids: Tensor) -> list[Text]:
    """Let the verifier answer prompts greedily, and let go of it; answers too short to measure on are left out.

    States of `layers` are kept, and the log-probabilities of `target_ids` (the draft vocabulary, int64 [Vd]).
    """
    verifier = Verifier.load(config.verifier, layers)
    ids = target_ids.to(verifier.device)
    texts = [_answered(verifier, prompt, config.doctor.max_tokens, ids) for prompt in _prompts(config)]
    del verifier
    free_memory()
    return [text for text in texts if len(_rows(text))]


def compare(
    head: DraftHead, tried: list[Variant], texts: list[Text], embedding: Tensor, device: torch.device
) -> Verdict:
    """Measure a head in each form, in float32."""
    head, embedding = head.to(device).eval(), embedding.to(device, torch.float32)
    measured = []
    for variant in tried:
        formed = _in_form(head, variant.config)
        if PAIRS in variant.changes:
            formed.load_state_dict(halves_from_pairs(formed.state_dict(), variant.config), assign=True)
        hits, nats = zip(*(teacher_forced(formed, text, embedding) for text in texts), strict=True)
        measured.append(Measured(variant, list(hits), list(nats)))
    return Verdict(measured)


def _in_form(head: DraftHead, config: DraftHeadConfig) -> DraftHead:
    """Return a head of the same weights, not copied, in another form of the same shapes."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*head.parameters(), *head.buffers())}
    formed = copy.deepcopy(head, shared)
    formed.config = config
    for layer in formed.layers:
        cast(DraftLayer, layer).norm_before_residual = config.norm_before_residual
    formed._rotary = (rotary_embedding(config),)
    return formed


def _prompts(config: Config) -> list[list[int]]:
    """Return the first turns of questions spread over the categories."""
    options = replace(config.evaluate, questions=config.evaluate.questions or "embedded")
    questions = [q for q in load_questions(options, config.data.local_images) if not q.images]
    if not questions:
        raise ValueError(f"evaluate.questions {options.questions!r}: all have images, and doctor measures on text")
    chosen = questions[:: max(1, len(questions) // config.doctor.num_prompts)][: config.doctor.num_prompts]
    reader, prompts = QuestionReader(config), []
    reader.check(chosen)
    for question in chosen:
        with contextlib.suppress(UnaskableError):  # it has been named
            prompts.append(reader.read(question, [])[0])
    return prompts


def _answered(verifier: Verifier, prompt: list[int], max_tokens: int, target_ids: Tensor) -> Text:
    tokens = prompt + answer_alone(verifier, prompt, max_tokens)
    answered = max(1, len(tokens) - len(prompt))
    output = verifier.forward(torch.tensor([tokens], device=verifier.device), logits_to_keep=answered)
    parts = output.aux_hidden_states[0].float().cpu().chunk(len(verifier.aux_layers), dim=-1)
    log_p = output.logits[0][:, target_ids].float().log_softmax(-1).cpu()
    return Text(tokens, len(prompt), dict(zip(verifier.aux_layers, parts, strict=True)), log_p)


def _rows(text: Text) -> Tensor:
    """Return the rows from which all steps predict tokens of the answer: for positions s ... e, s-1 ... e-1-STEPS."""
    return torch.arange(text.start - 1, max(text.start, len(text.tokens) - STEPS) - 1)


@torch.no_grad()
def teacher_forced(head: DraftHead, text: Text, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Run STEPS draft steps on a text; return its `hits` and `nats` of `Measured`."""
    device = embedding.device
    tokens, rows = torch.tensor(text.tokens, device=device), _rows(text)
    positions = torch.arange(len(tokens), device=device)
    attention = TTTAttention([len(tokens)], head.config.num_layers, head.config.window)
    state = head.fuse(torch.cat([text.aux[layer] for layer in head.config.aux_layers], dim=-1).to(device))
    hits = torch.zeros(len(rows), STEPS, dtype=torch.bool)
    nats = torch.zeros(len(rows))
    for step in range(STEPS):
        fed = tokens[(positions + 1 + step).clamp(max=len(tokens) - 1)]
        rotary = head.rotary(positions + step, state)
        state, normed = head.step(head.embed(fed, embedding), state, rotary, attention)
        log_q = head.lm_head(normed[rows]).log_softmax(-1)
        log_p = text.log_p[rows + 1 + step - text.start].to(device)
        nats += (log_p.exp() * (log_p.clamp(min=-1e4) - log_q)).sum(-1).cpu()  # p = 0 adds nothing
        hits[:, step] = (head.target_ids[log_q.argmax(-1)] == tokens[rows + 2 + step]).cpu()
    return hits, nats
