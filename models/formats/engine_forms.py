"""What serving engines make of each form of head, a row each.

Export, SERVING.md, doctor and the tables of the documentation follow from it. `ENGINES` names the releases read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ..head.config import DraftHeadConfig
from .fields import PARTIAL

VLLM, SGLANG, TENSORRT_LLM, LLAMA_CPP = "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp"
ENGINES = {VLLM: "0.32", SGLANG: "0.5.23", TENSORRT_LLM: "of November 2026", LLAMA_CPP: "of November 2026"}


class Kind(Enum):
    """What becomes of a form in an engine."""

    served = "served"
    flag = "with a flag"
    ignored = "ignored"  # and so lost, without an error
    refused = "refused"
    unread = "not read"  # in its sources


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a form."""

    kind: Kind
    why: str = ""  # it does not serve it, in a sentence that begins with the engine's name
    flag: Callable[[DraftHeadConfig], str] = lambda config: ""  # without which it does not


@dataclass(frozen=True)
class ServedHead:
    """A head and what counts of its verifier."""

    head: DraftHeadConfig
    verifier_layers: int
    architectures: list[str]  # the verifier's
    lm_head: bool = True  # whether the head's files hold it; if not, it is the verifier's


@dataclass(frozen=True)
class Form:
    """A form of head that not every engine serves."""

    name: str  # as the documentation has it
    holds: Callable[[ServedHead], bool]
    verdicts: tuple[Verdict, Verdict, Verdict, Verdict]  # of ENGINES, in their order


SERVED, UNREAD = Verdict(Kind.served), Verdict(Kind.unread, "fledge has not read whether it serves this form")


def _ignored(why: str) -> Verdict:
    return Verdict(Kind.ignored, why)


def _refused(why: str) -> Verdict:
    return Verdict(Kind.refused, why)


# SGLang's window does not count a token's own position.
_SGLANG_WINDOW = Verdict(
    Kind.flag, flag=lambda head: f"--speculative-draft-window-size {(head.sliding_window or 1) - 1}"
)
_ONE_CACHE = Verdict(Kind.flag, flag=lambda head: "--disable-hybrid-kv-cache-manager")
_NO_WINDOW = _ignored("it reads no window of a head")
_REPLACES_EMBEDDING = _ignored("it takes the verifier's embedding in place of the head's own")
_SKIPS_FC = _ignored("it takes aux states as wide as the head's own for its states, and skips fc")
_NO_FC_NORM = _refused("it knows no fc_norm")
_NO_QK_NORM = _refused("it knows no head with norms of q and k"), _ignored("it drops the norms of q and k"), UNREAD
_LAST = _refused("it cannot take the output of the verifier's last layer")
_BY_TRANSFORMERS = Verdict(Kind.flag, flag=lambda head: "--model-impl transformers")  # its own class gives no states


def _in_some_layers(served: ServedHead) -> bool:
    return 0 < len(served.head.window_layers) < served.head.num_layers


def _own_width(served: ServedHead) -> bool:
    return served.head.hidden_size != served.head.verifier_hidden_size


def _reads_last_layer(served: ServedHead) -> bool:
    return served.verifier_layers - 1 in served.head.aux_layers


def _of_gpt_oss(served: ServedHead) -> bool:
    return "GptOssForCausalLM" in served.architectures


def _of_gemma3(served: ServedHead) -> bool:
    return "Gemma3ForCausalLM" in served.architectures


def _narrow_aux_states(served: ServedHead) -> bool:
    head = served.head
    return len(head.aux_layers) == 1 or len(head.aux_layers) * head.verifier_hidden_size == head.hidden_size


# fmt: off
FORMS = (
    Form("`fc_norm` (EAGLE-3.1)", lambda served: served.head.fc_norm,
         (SERVED, SERVED, SERVED, _NO_FC_NORM)),
    Form("`norm_output` (EAGLE-3.1)", lambda served: served.head.norm_output,
         (SERVED, SERVED, SERVED, _ignored("it ignores norm_output"))),
    Form("`norm_before_residual`", lambda served: served.head.norm_before_residual,
         (SERVED, _ignored("it ignores norm_before_residual"), _ignored("it ignores norm_before_residual"), SERVED)),
    Form("`norm_before_fc`", lambda served: served.head.norm_before_fc, (SERVED, SERVED, SERVED, SERVED)),
    Form("`norm_before_fc` and `fc_norm`", lambda served: served.head.norm_before_fc and served.head.fc_norm,
         (SERVED, SERVED, _ignored("it applies fc_norm alone, and not norm_before_fc"), _NO_FC_NORM)),
    Form("`attention_bias`", lambda served: served.head.attention_bias,
         (SERVED, _ignored("it drops the biases of q, k and v"), SERVED, UNREAD)),
    Form("`qk_norm`", lambda served: served.head.qk_norm, (SERVED, *_NO_QK_NORM)),
    Form("`qk_norm` and `attention_bias`", lambda served: served.head.qk_norm and served.head.attention_bias,
         (_ignored("it drops the bias of o_proj in a head with norms of q and k"), *_NO_QK_NORM)),
    Form("`sliding_window` in every layer",
         lambda served: bool(served.head.window_layers) and not _in_some_layers(served),
         (SERVED, _SGLANG_WINDOW, _NO_WINDOW, UNREAD)),
    Form("`sliding_window` in some layers", _in_some_layers,
         (_ONE_CACHE, _ignored("its window is one of all layers"), _NO_WINDOW, UNREAD)),
    Form("rotation of a part of each head's dimensions", lambda served: PARTIAL in served.head.rope_parameters,
         (SERVED, SERVED, SERVED, UNREAD)),
    Form("several layers", lambda served: served.head.num_layers > 1,
         (SERVED, SERVED, SERVED, _refused("it knows heads of one layer only"))),
    Form("other than three aux layers", lambda served: len(served.head.aux_layers) != 3,
         (SERVED, SERVED, SERVED, _refused("it knows heads of three aux layers only"))),
    Form("one aux layer, or several that are together as wide as the head", _narrow_aux_states,
         (SERVED, _SKIPS_FC, _SKIPS_FC, UNREAD)),
    Form("the verifier's last layer among the aux layers",
         lambda served: _reads_last_layer(served) and not _of_gpt_oss(served), (SERVED, _LAST, SERVED, UNREAD)),
    Form("the same of gpt-oss", lambda served: _reads_last_layer(served) and _of_gpt_oss(served),
         (SERVED, SERVED, SERVED, UNREAD)),
    Form("an embedding of its own, of the verifier's width",
         lambda served: served.head.own_embedding and not _own_width(served),
         (SERVED, _REPLACES_EMBEDDING, _REPLACES_EMBEDDING, SERVED)),
    Form("another width than the verifier's", _own_width, (SERVED, SERVED, SERVED, SERVED)),
    Form("no lm_head in the file: the verifier's is taken", lambda served: not served.lm_head,
         (SERVED, SERVED, SERVED, SERVED)),
    Form("any, of a Gemma 3 verifier (text)", _of_gemma3,
         (_BY_TRANSFORMERS, SERVED, _refused("its Gemma 3 gives no states of its layers"), UNREAD)),
)
# fmt: on


def _verdicts(engine: str, served: ServedHead) -> list[Verdict]:
    column = list(ENGINES).index(engine)
    return [form.verdicts[column] for form in FORMS if form.holds(served)]


def obstacles(engine: str, served: ServedHead) -> list[str]:
    """Return why an engine cannot serve a head as it was trained; empty if it can."""
    found = [verdict.why for verdict in _verdicts(engine, served) if verdict.kind not in (Kind.served, Kind.flag)]
    return list(dict.fromkeys(found))


def flags(engine: str, served: ServedHead) -> str:
    """Return the flags without which an engine serves a head otherwise than it was trained, as a command has them."""
    found = [verdict.flag(served.head) for verdict in _verdicts(engine, served) if verdict.kind is Kind.flag]
    return "".join(f" {flag}" for flag in found)


def forms_of(served: ServedHead) -> list[str]:
    """Return the names of a head's forms."""
    return [form.name for form in FORMS if form.holds(served)]
