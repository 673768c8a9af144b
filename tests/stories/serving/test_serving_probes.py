"""Every known way to lose acceptance, done to a sound head: what vLLM makes of it, and whether the doctor names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Run, copy_parts
from fledge.conf.schema import Config, Device, Dtype, VerifierConfig
from fledge.eval.doctor.doctor import diagnose, report
from fledge.models.formats.fields import AUX_IDS as IDS
from make_embedded import TINY, shared_embedded
from safetensors.torch import load_file, save_file
from serving import COUNTS, decode_in_vllm, evaluated

pytestmark = pytest.mark.serving
FORMS = {
    "EAGLE-3": ["draft=eagle3"],
    "EAGLE-3.1": [],
    "full vocabulary": ["draft=eagle3", "draft.vocab_size=null", "train.max_steps=300"],
    "norm before fc": ["draft=eagle3", "draft.norm_before_fc=true"],
    "window": ["draft=eagle3", "draft.sliding_window=16"],
}
TALKER = replace(  # a verifier that has more to say than the tests' tiny one, so that a head has something to lose
    TINY,
    hidden_size=96,
    num_heads=3,
    intermediate_size=192,
    vocab_size=800,
    num_conversations=4000,
    steps=1500,
)
OPTIONS = [
    "data.sources=[{path:embedded,limit:1500}]",
    "data.heldout_share=0.03",
    "synthesize.batch_size=32",
    "dump.shard_tokens=100000",
    "draft.vocab_size=500",
    "train.max_steps=900",
    "train.batch_tokens=1024",
    "evaluate.questions_per_category=2",
    "evaluate.max_tokens=40",
    "evaluate.baselines=false",
]


@dataclass(frozen=True)
class Probe:
    """One mistake in a head's files."""

    damage: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]  # changes config.json and tensors in place
    finding: str  # the doctor's code
    most: float = 0.95  # share of the sound head's accepted tokens a draft that is left, at most
    error: str | None = None  # what vLLM says where it stops, instead of losing
    form: str = "EAGLE-3"
    format: str = "plain"


def aux_ids_one_lower(values, _):
    values[IDS] = [k - 1 for k in values[IDS]]


def normed_residual(values, _):
    values["norm_before_residual"] = True


def no_word_on_the_residual(values, _):
    del values["norm_before_residual"]


def other_state_fed_back(values, _):
    values["norm_output"] = not values["norm_output"]


def no_d2t(_, tensors):
    del tensors["d2t"]


def no_lm_head(_, tensors):
    del tensors["lm_head.weight"]


def absolute_d2t(_, tensors):
    tensors["d2t"] += torch.arange(len(tensors["d2t"]))


def needless_d2t(values, tensors):
    tensors["d2t"] = torch.zeros(values["vocab_size"], dtype=torch.int64)


def unknown_tensor(_, tensors):
    tensors["midlayer.self_attn.sinks"] = torch.ones(3)


def norm_of_queries(values, tensors):
    tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(values["head_dim"])


def no_norm_before_fc(values, _):
    values["norm_before_fc"] = values["eagle_config"]["norm_before_fc"] = False


def no_window(values, _):
    del values["layer_types"]


def prefixed_tensor(_, tensors):
    tensors["model.norm.weight"] = tensors.pop("norm.weight")


def other_rope_theta(values, _):
    values["rope_theta"] *= 50
    values["rope_parameters"]["rope_theta"] *= 50


UNKNOWN = "no module or parameter named "
MEASURED = "trained_otherwise"
PROBES = {
    "aux ids one lower": Probe(aux_ids_one_lower, "aux_contradictory"),
    "norm_before_residual: true": Probe(normed_residual, MEASURED, most=0.8),
    "norm_before_residual absent": Probe(
        no_word_on_the_residual, "norm_before_residual_absent", most=0.8, format="speculators"
    ),
    "norm_output: true": Probe(other_state_fed_back, MEASURED),
    "norm_output: false": Probe(other_state_fed_back, MEASURED, form="EAGLE-3.1"),
    "no d2t": Probe(no_d2t, "d2t_absent", most=0.1),
    "no lm_head": Probe(no_lm_head, "lm_head_absent", most=0.1),
    "d2t of absolute ids": Probe(absolute_d2t, "d2t_absolute", error="out of bounds"),
    "d2t beside a full vocabulary": Probe(
        needless_d2t, "d2t_full", error=UNKNOWN + "'draft_id_to_target_id'", form="full vocabulary"
    ),
    "unknown tensor": Probe(unknown_tensor, "unknown_tensors", error="sinks"),
    "norm of queries in a Llama head": Probe(norm_of_queries, "qk_norm", error="q_norm"),
    "norm_before_fc: false": Probe(no_norm_before_fc, "norm_before_fc", most=0.8, form="norm before fc"),
    "no layer_types": Probe(no_window, "window", form="window"),
    "model. before a tensor": Probe(prefixed_tensor, "prefixed", error=UNKNOWN + "'model'"),
    "rope_theta x 50": Probe(other_rope_theta, "rope", most=1.1),  # little of it shows on short texts
}


def findings(run: Run, head: Path) -> list[str]:
    """Give the codes of what the doctor finds in the files, and on the verifier's answers to the embedded questions."""
    config = Config(name="x", verifier=VerifierConfig(str(run.verifier), dtype=Dtype.float32, device=Device.cpu))
    config.head_import.source, config.doctor.num_prompts = str(head), 80
    diagnosis = diagnose(config)
    print(report(diagnosis))
    return [finding.code for finding in diagnosis.findings]


@dataclass
class Sound:
    """A head as fledge exports it, and what vLLM counted with it."""

    run: Run
    request: dict[str, Any]
    counted: dict[str, Any]


def accepted(counted: dict[str, Any]) -> float:
    """Give the accepted tokens a draft."""
    return counted["num_accepted_tokens"] / counted["num_drafts"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Callable[[str], Sound]:
    """Heads by form, each made once; vLLM counts with each what was evaluated, and the doctor finds nothing."""
    folder = tmp_path_factory.mktemp("sound")
    verifier = shared_embedded(TALKER)
    first = Run(folder, verifier, "first", OPTIONS)
    first("synthesize")
    made: dict[str, Sound] = {}

    def make(form: str) -> Sound:
        run = Run(folder, verifier, form.replace(" ", "_"), [*OPTIONS, *FORMS[form]])
        copy_parts(first, run, "conversations")
        for stage in ("dump", "train", "evaluate"):
            run(stage)
        run("export", "export.dtype=float32", "export.format=all")
        results, request, texts = evaluated(run)
        counted, log = decode_in_vllm(folder, {**request, "head": str(run.path / "exports" / "plain")})
        assert counted is not None, log[-6000:]
        assert {name: counted[name] for name in COUNTS} == {name: results[name] for name in COUNTS}
        assert counted["texts"] == texts
        assert accepted(counted) > 0.4, "a head that accepts little has little to lose"
        assert [findings(run, run.path / "exports" / name) for name in ("plain", "speculators")] == [[], []]
        return Sound(run, request, counted)

    def get(form: str) -> Sound:
        if form not in made:
            made[form] = make(form)
        return made[form]

    return get


def damaged_copy(source: Path, target: Path, probe: Probe) -> Path:
    shutil.copytree(source, target)
    values, tensors = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    probe.damage(values, tensors)
    (target / "config.json").write_text(json.dumps(values))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", PROBES)
def test_a_damaged_head_loses_in_vllm_and_the_doctor_names_the_damage(sound, tmp_path, name):
    probe = PROBES[name]
    whole = sound(probe.form)
    head = damaged_copy(whole.run.path / "exports" / probe.format, tmp_path / "head", probe)
    counted, log = decode_in_vllm(tmp_path, {**whole.request, "head": str(head)})
    found = findings(whole.run, head)
    length = "error" if counted is None else f"{1 + accepted(counted):.3f}"
    print(f"{name} | {probe.form}, {probe.format} | {1 + accepted(whole.counted):.3f} | {length} | {found}")
    assert probe.finding in found
    if probe.error:
        assert counted is None
        assert probe.error in log, log[-6000:]
        return
    assert counted is not None, log[-6000:]
    assert counted["texts"] == whole.counted["texts"], "a wrong head must not change the output"
    assert accepted(counted) <= probe.most * accepted(whole.counted)
