"""Form by engine: every row has a head that shows it, and export, SERVING.md, card and documentation follow it."""

import json
import re
from dataclasses import replace

import make_engine_forms
import pytest
import torch
from builders import make_head
from fledge.conf.schema import Config, Dtype, ExportFormat
from fledge.models.export import export
from fledge.models.formats.engine_forms import ENGINES, FORMS, Form, Kind, ServedHead, flags, forms_of, obstacles
from fledge.models.formats.plain import load_head, save_head
from fledge.models.import_head import import_head
from fledge.models.verifier.weights import VerifierWeights, verifier_identity
from published_heads import assert_same_head
from safetensors import safe_open

PLAIN = {"fc_norm": False, "norm_output": False}
WINDOW = {"sliding_window": 32, "window_layers": (0,)}
# A head of each row, in the order of the rows.
EXAMPLES = (
    {"norm_output": False},
    {"fc_norm": False},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"norm_before_fc": True, "fc_norm": True},
    {"attention_bias": True},
    {"qk_norm": True},
    {"qk_norm": True, "attention_bias": True},
    WINDOW,
    {"num_layers": 2, **WINDOW},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"num_layers": 2},
    {"aux_layers": (1, 4)},
    {"aux_layers": (3,)},
    {"aux_layers": (1, 3, 7)},
    {"aux_layers": (1, 3, 7)},
    {"own_embedding": True},
    {"hidden_size": 24, "own_embedding": True},
    {"draft_vocab_size": None},
    {},
)
VERIFIERS = {"gpt-oss": "GptOssForCausalLM", "Gemma 3": "Gemma3ForCausalLM"}  # by what a row's name says of it
ROWS = list(zip(FORMS, EXAMPLES, strict=True))


def served(form: Form, changes: dict) -> ServedHead:
    named = [architecture for name, architecture in VERIFIERS.items() if name in form.name] or ["LlamaForCausalLM"]
    return ServedHead(make_head(**{**PLAIN, **changes}).config, 8, named, "no lm_head" not in form.name)


@pytest.mark.parametrize(("form", "changes"), ROWS, ids=[form.name for form in FORMS])
def test_a_row_says_of_each_engine_what_becomes_of_its_head(form, changes):
    head = served(form, changes if "EAGLE-3.1" not in form.name else {**dict.fromkeys(PLAIN, True), **changes})
    assert form.holds(head)
    assert not form.holds(ServedHead(make_head(**PLAIN).config, 8, ["LlamaForCausalLM"]))
    assert form.name in forms_of(head)
    for engine, verdict in zip(ENGINES, form.verdicts, strict=True):
        if verdict.kind is Kind.flag:
            assert re.fullmatch(r"--[a-z-]+( \w+)?", verdict.flag(head.head))
            assert f" {verdict.flag(head.head)}" in flags(engine, head)
        assert bool(verdict.why) is (verdict.kind not in (Kind.served, Kind.flag))
        assert not verdict.why or verdict.why in obstacles(engine, head)


def test_a_plain_head_is_served_by_all():
    head = ServedHead(make_head(**PLAIN).config, 8, ["LlamaForCausalLM"])
    assert [[*obstacles(engine, head), flags(engine, head)] for engine in ENGINES] == [[""]] * len(ENGINES)


def test_sglangs_window_does_not_count_the_position_itself():
    head = ServedHead(make_head(**WINDOW).config, 8, [])
    assert flags("SGLang", head) == " --speculative-draft-window-size 31"
    assert flags("vLLM", head) == ""


def exported(tmp_path, config: Config, **changes: object) -> str:
    """Export a head in plain format; return its SERVING.md."""
    folder = tmp_path / "head"
    folder.mkdir(exist_ok=True)
    save_head(folder, make_head(**changes), {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
    config.export.checkpoint = str(folder)
    export(config)
    return (config.run_folder / "exports" / "plain" / "SERVING.md").read_text()


def test_serving_commands_have_the_flags_that_a_form_needs(tmp_path, config):
    notes = exported(tmp_path, config, **WINDOW)
    assert "--speculative-num-draft-tokens 4 --speculative-draft-window-size 31\n" in notes
    assert "TensorRT-LLM cannot serve this head: it reads no window" in notes
    card = (config.run_folder / "exports" / "plain" / "README.md").read_text()
    assert "- `sliding_window` in every layer\n" in card
    notes = exported(tmp_path, config, num_layers=2, **WINDOW)
    assert re.search("vllm serve .*--disable-hybrid-kv-cache-manager\n", notes)
    assert "SGLang cannot serve this head: its window is one of all layers" in notes


def test_a_head_that_no_engine_serves_is_refused_with_every_reason(tmp_path, config, capsys):
    reasons = (
        r"no engine.*vLLM: it drops the bias of o_proj.*SGLang: it drops the biases.*TensorRT-LLM: it drops the norms"
    )
    with pytest.raises(ValueError, match=rf"export\.format=plain is read by {reasons}"):
        exported(tmp_path, config, qk_norm=True, attention_bias=True)
    config.export.format = ExportFormat.all
    with pytest.raises(ValueError, match="by no engine, in no format"):
        exported(tmp_path, config, qk_norm=True, attention_bias=True)
    assert re.search(reasons, capsys.readouterr().out)
    assert not (config.run_folder / "exports").exists()


def own_lm_head(config: Config, folder, **changes: object) -> None:
    """Save a head whose lm_head is the verifier's."""
    head = make_head(draft_vocab_size=None)
    with torch.no_grad():
        head.lm_head.weight.copy_(VerifierWeights(config.verifier).lm_head())
        for row, value in changes.items():
            head.lm_head.weight[int(row.removeprefix("row"))] += value
    save_head(folder, head, {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
    config.export.checkpoint, config.export.lm_head = str(folder), False
    config.export.format, config.export.dtype = ExportFormat.all, Dtype.float32


def test_an_lm_head_that_is_the_verifiers_can_be_left_to_it(tmp_path, config):
    own_lm_head(config, tmp_path)
    export(config)
    for name in ("plain", "speculators"):
        folder = config.run_folder / "exports" / name
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        values = json.loads((folder / "config.json").read_text())
        assert (values["draft_vocab_size"], values.get("reuse_target_lm_head")) == (
            (None, None) if name == "plain" else (120, True)
        )
        assert "no `lm_head` of its own" in (folder / "SERVING.md").read_text()
        config.head_import.source = str(folder)
        import_head(config)
        head = load_head(tmp_path)[0]
        assert_same_head(load_head(config.run_folder / "imports" / name)[0], head, torch.float32)
    config.export.checkpoint = str(config.run_folder / "exports" / "plain")
    with pytest.raises(ValueError, match=r"without lm_head\.weight, .*fledge import"):
        export(config)


def test_another_lm_head_than_the_verifiers_is_not_left_out(tmp_path, config):
    own_lm_head(config, tmp_path, row7=0.5, row9=0.25)
    with pytest.raises(ValueError, match=r"export\.lm_head=false .*has 2 rows that differ.*export\.lm_head=true"):
        export(config)
    save_head(tmp_path, make_head(), {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
    with pytest.raises(ValueError, match=r"export\.lm_head=false .*has 100 rows of 32"):
        export(config)


@pytest.mark.parametrize("page", make_engine_forms.TABLES, ids=lambda page: page.name)
def test_the_tables_of_the_documentation_are_the_rows(page):
    assert page.read_text() == make_engine_forms.text(page), "run python tests/tools/make_engine_forms.py"


def test_a_changed_row_changes_the_documentation(monkeypatch):
    changed = (replace(FORMS[0], name="`another`"), *FORMS[1:])
    monkeypatch.setattr(make_engine_forms, "FORMS", changed)
    assert "| `another` |" in make_engine_forms.by_form()
