"""Which form a head's weights were trained for, measured: the same weights under every plausible configuration.

A head is nearest to its verifier, by KL(p || q), in the form it was trained for. Forms are compared row by row on the
verifier's own greedy answers, teacher-forced, as in training; what the texts do not settle is called open.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...conf.schema import Config
from ...models.formats.published import halves_from_pairs
from ...models.head.config import DraftHeadConfig, rope_of
from ...models.head.draft_head import DraftHead, DraftLayer
from ...models.head.ttt_attention import TTTAttention
from ...models.verifier.config import torch_device
from ...models.verifier.model import Verifier
from ..asking import QuestionReader, UnaskableError
from ..decoding.speculator import answer_alone
from ..questions import load_questions
from .rules import AUX, NORM_BEFORE_RESIDUAL, NORM_OUTPUT, PAIRS, ROPE, Published

CONFIGURED = "as configured"
PAIRS_CURE = (
    "import it with head_import.interleaved_rotary=true, which reorders q_proj and k_proj, and serve its export"
)
STEPS = 3
MIN_TEXTS = 4
FAR = 0.6  # first draft tokens that are the verifier's: if fewer in every form, the head is weak or in none of them
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


@dataclass(frozen=True)
class Measured:
    """A variant on every text: rows from which decoding could start, STEPS draft steps each."""

    variant: Variant
    hits: list[Tensor]  # by text, bool [rows, STEPS]: the draft token is the verifier's
    nats: list[Tensor]  # by text, [rows]: KL(p || q), summed over steps

    @property
    def first(self) -> float:
        """Return the share of rows whose first draft token is the verifier's."""
        return float(torch.cat(self.hits)[:, 0].double().mean())

    @property
    def length(self) -> float:
        """Return the tokens gained in STEPS steps, the verifier's own included."""
        return 1 + float(torch.cat(self.hits).long().cumprod(dim=1).sum(dim=1).double().mean())

    @property
    def loss(self) -> float:
        """Return the mean nats a row."""
        return float(torch.cat(self.nats).mean())

    def clearly_further_than(self, other: Measured) -> bool:
        """Return whether this form is further from the verifier, by CLEAR standard errors."""
        return _mean_over_error(self.nats, other.nats) > CLEAR


def _mean_over_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the mean difference over rows in its standard errors; rows of one text count as drawn together."""
    sums = torch.stack([(a - b).double().sum() for a, b in zip(ours, theirs, strict=True)])
    rows = torch.tensor([len(text) for text in ours], dtype=torch.float64)
    mean = sums.sum() / rows.sum()
    spread = (sums - mean * rows).square().sum() * len(rows) / (len(rows) - 1)
    return float(mean * rows.sum() / spread.sqrt().clamp(min=1e-9))


@dataclass(frozen=True)
class Verdict:
    """What the measurement tells; `measured` from the form nearest to the verifier on."""

    measured: list[Measured]

    @property
    def configured(self) -> Measured:
        """Return the head as it is."""
        return next(measured for measured in self.measured if not measured.variant.changes)

    @property
    def alike(self) -> list[Measured]:
        """Return forms that the texts do not tell from the nearest one, those of fewest changes first."""
        found = [m for m in self.measured if not m.clearly_further_than(self.measured[0])]
        return sorted(found, key=lambda measured: len(measured.variant.changes))

    @property
    def candidates(self) -> list[Measured]:
        """Return forms the weights may have been trained for: of those alike, the nearest to the head as configured."""
        alike = self.alike
        return [m for m in alike if len(m.variant.changes) == len(alike[0].variant.changes)]

    @property
    def as_configured(self) -> bool:
        """Return whether nothing speaks against the head as configured."""
        return not self.alike[0].variant.changes

    @property
    def best_first(self) -> float:
        """Return the largest share of first draft tokens that are the verifier's, in any form."""
        return max(measured.first for measured in self.measured)

    @property
    def otherwise(self) -> bool:
        """Return whether the weights were trained for another form, in which they accept more."""
        return not self.as_configured and all(one.length > self.configured.length for one in self.candidates)

    @property
    def aux_layers(self) -> list[int] | None:
        """Return the layers the weights were trained on; None if the texts do not tell."""
        layers = {one.variant.config.aux_layers for one in self.candidates}
        return list(layers.pop()) if len(layers) == 1 else None

    def settles(self, change: str) -> bool:
        """Return whether the head as configured is right in this respect: all forms that differ in it are ruled out."""
        return self.as_configured and not any(change in m.variant.changes for m in self.alike)


def variants(head: Published, config: DraftHeadConfig) -> list[Variant]:
    """Return the forms to try: aux layers one up or down, both norm flags, the verifier's rope, in every combination.

    And, by itself, the rotation of Llama 4 and GPT-J: of neighbouring dimensions as pairs.
    """
    theirs = rope_of(head.verifier)
    ropes = [config.rope_parameters, *([theirs] if theirs != config.rope_parameters else [])]
    flags, tried = (False, True), []
    for shift, residual, output, rope in itertools.product((0, 1, -1), flags, flags, ropes):
        layers = tuple(layer + shift for layer in config.aux_layers)
        if min(layers) < 0 or max(layers) >= head.verifier.num_hidden_layers:
            continue
        formed = replace(
            config,
            aux_layers=layers,
            norm_before_residual=config.norm_before_residual ^ residual,
            norm_output=config.norm_output ^ output,
            rope_parameters=rope,
        )
        flag = f"norm_before_residual: {str(formed.norm_before_residual).lower()}"
        feedback = f"norm_output: {str(formed.norm_output).lower()}"
        forms = (  # what differs, whether it does, its name, the fields that declare it
            (AUX, shift, f"aux layers {list(layers)}", ", ".join(head.written_ids(layers))),
            (NORM_BEFORE_RESIDUAL, residual, flag, flag),
            (NORM_OUTPUT, output, feedback, feedback),
            (ROPE, rope is theirs, "rope of the verifier", f"rope_theta, rope_scaling and rope_parameters: {theirs}"),
        )
        made = [(change, name, cure) for change, differs, name, cure in forms if differs]
        changes, names, cures = zip(*made, strict=True) if made else ((), (CONFIGURED,), ())
        tried.append(Variant(changes, ", ".join(names), formed, ", ".join(cures)))
    if not head.options.interleaved_rotary and config.head_dim % 2 == 0:
        tried.append(Variant((PAIRS,), "rotary pairs (interleaved)", config, PAIRS_CURE))
    return tried


def measure(config: Config, head: DraftHead, tried: list[Variant], embedding: Tensor) -> Verdict:
    """Let the verifier answer a few prompts, and compare the forms of a head on the answers.

    Args:
        embedding: the verifier's [V, H].

    Raises:
        ValueError: the answers are too few or too short to measure on.
    """
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

    Args:
        layers: whose states to keep.
        target_ids: of the draft vocabulary, int64 [Vd].
    """
    verifier = Verifier.load(config.verifier, layers)
    ids = target_ids.to(verifier.device)
    texts = [_answered(verifier, prompt, config.doctor.max_tokens, ids) for prompt in _prompts(config)]
    del verifier
    gc.collect()  # its hooks refer back to it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
            formed.load_state_dict(halves_from_pairs(formed.state_dict(), variant.config.head_dim), assign=True)
        hits, nats = zip(*(teacher_forced(formed, text, embedding) for text in texts), strict=True)
        measured.append(Measured(variant, list(hits), list(nats)))
    return Verdict(sorted(measured, key=lambda one: one.loss))


def _in_form(head: DraftHead, config: DraftHeadConfig) -> DraftHead:
    """Return a head of the same weights, not copied, in another form of the same shapes."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(head.parameters(), head.buffers())}
    formed = copy.deepcopy(head, shared)
    formed.config = config
    for layer in formed.layers:
        cast(DraftLayer, layer).norm_before_residual = config.norm_before_residual
    formed._rotary = (LlamaRotaryEmbedding(config.llama_config()),)
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
    output = verifier.forward(
        torch.tensor([tokens], device=verifier.device), logits_to_keep=max(1, len(tokens) - len(prompt))
    )
    parts = output.aux_hidden_states[0].float().cpu().chunk(len(verifier.aux_layers), dim=-1)
    log_p = output.logits[0][:, target_ids].float().log_softmax(-1).cpu()
    return Text(tokens, len(prompt), dict(zip(verifier.aux_layers, parts, strict=True)), log_p)


def _rows(text: Text) -> Tensor:
    """Return the rows from which all steps predict tokens of the answer: for positions s ... e, s-1 ... e-1-STEPS."""
    return torch.arange(text.start - 1, max(text.start, len(text.tokens) - STEPS) - 1)


@torch.no_grad()
def teacher_forced(head: DraftHead, text: Text, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Run STEPS draft steps on a text.

    Returns:
        Where the head's greedy token is the text's (bool [rows, STEPS]), and KL(p || q) summed over steps (float32
        [rows]).
    """
    device = embedding.device
    tokens, rows = torch.tensor(text.tokens, device=device), _rows(text)
    positions = torch.arange(len(tokens), device=device)
    attention = TTTAttention([len(tokens)], head.config.num_layers)
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
