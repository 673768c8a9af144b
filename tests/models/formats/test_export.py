"""The export command: files, commands for engines, and the model card."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import make_head
from fledge.conf.schema import (
    Config,
    ExportFormat,
)
from fledge.models.export import export
from fledge.models.formats.plain import load_head, save_head
from fledge.models.import_head import import_head
from fledge.models.verifier.weights import VerifierWeights, verifier_identity
from huggingface_hub import ModelCard
from published_heads import IDS, assert_same_head, published
from safetensors.torch import load_file


def test_an_imported_head_is_exported_and_imported_again_unchanged(tmp_path, config, small_verifier):
    theirs = published(tmp_path)
    embedding = VerifierWeights(config.verifier).embedding()
    theirs.change_tensors(embed_tokens__weight=embedding.bfloat16())
    head = make_head(fc_norm=False, norm_output=False)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    imported = config.run_folder / "imports" / "published"
    read, record = load_head(imported)
    assert_same_head(read, head, torch.bfloat16)
    assert (record["step"], record["imported_from"]) == (0, "published")
    assert record["verifier"]["vocab_size"] == 120
    assert "embed_tokens.weight" not in load_file(imported / "model.safetensors")

    config.export.checkpoint, config.export.format = str(imported), ExportFormat.all
    export(config)
    for name in ("plain", "speculators"):
        config.head_import.source = str(config.run_folder / "exports" / name)
        import_head(config)
        again, _ = load_head(config.run_folder / "imports" / name)
        assert_same_head(again, head, torch.bfloat16)
    values = json.loads((config.run_folder / "exports" / "speculators" / "config.json").read_text())
    verifier = values["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(small_verifier), "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match=r"holds a head in Speculators format.*fledge import"):
        load_head(config.run_folder / "exports" / "speculators")


def test_an_embedding_of_the_heads_own_is_kept_and_other_engines_than_vllm_are_named(tmp_path, config, capsys):
    theirs = published(tmp_path)
    embedding = VerifierWeights(config.verifier).embedding().clone()
    embedding[7, 3] += 0.5
    theirs.change_tensors(embed_tokens__weight=embedding)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    assert "differs from the embedding of verifier.path" in capsys.readouterr().out
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    head, _ = load_head(Path(config.export.checkpoint))
    assert torch.equal(head.embed_tokens.weight, embedding)
    export(config)
    notes = (config.run_folder / "exports" / "plain" / "SERVING.md").read_text()
    assert notes.count("cannot serve this head: it takes the verifier's embedding") == 2
    assert "launch_server" not in notes
    assert not (config.run_folder / "exports" / "plain" / "trtllm.yaml").exists()


def test_the_verifiers_last_layer_is_not_served_by_sglang(tmp_path, config):
    theirs = published(tmp_path, aux_layers=(1, 3, 7))
    theirs.change_config(eagle_config={IDS: [1, 3, 7]})
    config.head_import.source = str(theirs.folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    export(config)
    notes = (config.run_folder / "exports" / "plain" / "SERVING.md").read_text()
    assert "SGLang cannot serve this head: it cannot take the output of the verifier's last layer" in notes
    assert "trtllm-serve" in notes


def exported(tmp_path: Path, config: Config) -> Path:
    config.head_import.source = str(published(tmp_path).folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    config.export.format = ExportFormat.all
    export(config)
    return config.run_folder / "exports"


def test_serving_notes_name_the_engines_that_read_the_format(tmp_path, config):
    folder = exported(tmp_path, config)
    plain, speculators = ((folder / name / "SERVING.md").read_text() for name in ("plain", "speculators"))
    for words in (
        f'"model": "{folder / "plain"}", "num_speculative_tokens": 3',
        "--speculative-algorithm EAGLE3 --speculative-draft-model-path",
        "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
        "trtllm-serve",
    ):
        assert words in plain
    assert f"vllm serve {folder / 'speculators'}" in speculators
    assert "SGLang" not in speculators
    assert "TensorRT" not in speculators
    assert not (folder / "speculators" / "trtllm.yaml").exists()
    assert (folder / "plain" / "trtllm.yaml").read_text() == (
        "speculative_config:\n  decoding_type: Eagle3\n  max_draft_len: 3\n"
        f'  speculative_model: "{folder / "plain"}"\n  eagle3_layers_to_capture: [1, 3, 4]\n'
    )


@pytest.mark.parametrize(
    ("form", "plain", "speculators"),
    [
        ({}, {}, {}),
        (
            {"norm_before_residual": True},
            {"SGLang": "ignores norm_before_residual", "TensorRT-LLM": "ignores norm_b"},
            {},
        ),
        ({"aux_layers": (1, 3)}, {}, {}),
        ({"aux_layers": (0, 1, 3, 4), "norm_before_fc": True}, {"TensorRT-LLM": "applies fc_norm alone"}, {}),
        ({"aux_layers": (1, 3, 7)}, {"SGLang": "last layer"}, {}),
        (
            {"own_embedding": True, "norm_before_residual": True},
            {"SGLang": "norm_before_residual and it takes the verifier's embedding", "TensorRT-LLM": "embedding"},
            {},
        ),
        ({"hidden_size": 24, "own_embedding": True}, {}, {}),
    ],
)
def test_an_export_has_commands_for_the_engines_that_serve_it_as_it_was_trained(
    tmp_path, config, capsys, form, plain, speculators
):
    folder = tmp_path / "head"
    folder.mkdir()
    save_head(folder, make_head(**form), {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
    config.export.checkpoint, config.export.format = str(folder), ExportFormat.all
    export(config)
    said = capsys.readouterr().out
    commands = {"vLLM": "vllm serve", "SGLang": "sglang.launch_server", "TensorRT-LLM": "trtllm-serve"}
    for name, refused, engines in (("plain", plain, commands), ("speculators", speculators, ["vLLM"])):
        exported = config.run_folder / "exports" / name
        notes = (exported / "SERVING.md").read_text()
        for engine in engines:
            assert (commands[engine] in notes) is (engine not in refused)
            if engine in refused:
                assert re.search(f"{engine} cannot serve this head: .*{refused[engine]}", notes)
                assert re.search(f"export: {engine} cannot serve this head: .*{refused[engine]}", said)
        assert (exported / "trtllm.yaml").exists() is (name == "plain" and "TensorRT-LLM" not in refused)
    assert ("exports/speculators, served by" in said) is not bool(speculators)


def test_engines_are_told_to_draft_a_chain_as_deep_as_the_tree_that_was_evaluated(tmp_path, config):
    options = config.evaluate
    options.num_draft_tokens, options.tree_depth, options.tree_top_k = 60, 7, 10
    folder = exported(tmp_path, config)
    assert '"num_speculative_tokens": 7' in (folder / "plain" / "SERVING.md").read_text()
    assert "max_draft_len: 7\n" in (folder / "plain" / "trtllm.yaml").read_text()
    assert '"speculative_tokens": 7' in (folder / "speculators" / "config.json").read_text()


def test_a_model_card_shows_only_what_belongs_to_its_head(tmp_path, config, small_verifier):
    folder = exported(tmp_path, config)
    card = (folder / "plain" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "base_model" not in front, "a folder is no hub id"
    assert f"# EAGLE-3 draft head for {small_verifier.name}" in card
    assert "license: other\n" in front
    assert "- eagle3\n" in front
    assert "library_name: speculators" in (folder / "speculators" / "README.md").read_text()
    assert str(small_verifier) not in card
    assert "the verifier's licence applies" in card
    assert "Converted with fledge from `published`" in card
    assert "## Acceptance" not in card
    config.conversations_folder.mkdir()
    (config.conversations_folder / "manifest.json").write_text(json.dumps({"complete": True}))
    counts = {"acceptance_length": 2.346, "acceptance_rate_per_pos": [0.8, 0.4, 0.146]}
    results = {
        **counts,
        "by_category": {"writing": {"trained head": counts}},
        "num_draft_tokens_per_round": 3,
        "num_questions": 80,
        "questions": "/somewhere/question.jsonl",
        "drafting": "chain",
        "temperature": 0.0,
        "dtype": "float32",
        "max_tokens": 64,
        "definition": "tokens per round",
    }
    evaluation = config.run_folder / "evaluation"
    evaluation.mkdir()
    (evaluation / "acceptance.json").write_text(json.dumps(results))
    manifests = [
        json.loads((folder / "plain" / "manifest.json").read_text())["settings"]["head"],
        "of another head",
    ]
    for head, shown in zip(manifests, (True, False), strict=True):
        (evaluation / "manifest.json").write_text(json.dumps({"complete": True, "settings": {"head": head}}))
        export(config)
        card = (folder / "plain" / "README.md").read_text()
        assert ("| writing | 2.35 | 0.80 | 0.40 | 0.15 |" in card) is shown
        found = [(one.dataset_name, one.metric_value) for one in ModelCard(card).data.eval_results or []]
        assert found == ([("question.jsonl", 2.346), ("question.jsonl (writing)", 2.346)] if shown else [])
        assert "/somewhere" not in card
        assert "## Training data" not in card, "the run's conversations are not what an imported head was trained on"


def test_a_head_whose_config_was_corrected_is_exported_anew(tmp_path, config, capsys):
    folder = exported(tmp_path, config)
    source = Path(config.export.checkpoint)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-4}))
    export(config)
    assert "is complete" not in capsys.readouterr().out
    assert json.loads((folder / "plain" / "config.json").read_text())["rms_norm_eps"] == 1e-4


def test_a_head_serves_as_long_a_text_as_its_verifier(tmp_path, config):
    theirs = published(tmp_path)
    for length, served in ((8, 256), (4096, 4096)):
        theirs.change_config(max_position_embeddings=length)
        config.head_import.source, config.overwrite = str(theirs.folder), True
        import_head(config)
        config.export.checkpoint = str(config.run_folder / "imports" / "published")
        export(config)
        values = json.loads((config.run_folder / "exports" / "plain" / "config.json").read_text())
        assert values["max_position_embeddings"] == served


def test_an_export_with_other_draft_tokens_is_made_anew_and_an_equal_one_is_kept(tmp_path, config, capsys):
    folder = exported(tmp_path, config)
    weights = folder / "speculators" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    export(config)
    assert weights.stat().st_mtime_ns == before
    config.evaluate.num_draft_tokens = 7
    export(config)
    values = json.loads((folder / "speculators" / "config.json").read_text())
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert not list(folder.glob(".*.tmp"))
    shutil.rmtree(folder / "speculators")
    (folder / "speculators").mkdir()
    with pytest.raises(ValueError, match="not an export of fledge's"):
        export(config)


def test_a_window_may_be_put_on_when_a_head_is_exported(tmp_path, config, capsys):
    trained, record = tmp_path / "trained", {"verifier": verifier_identity(config.verifier), "step": 1}
    trained.mkdir()
    save_head(trained, make_head(num_layers=2), record, torch.float32)
    config.export.checkpoint, config.export.format = str(trained), ExportFormat.all
    for window in (16, None):
        config.export.sliding_window = window
        export(config)
        for name in ("plain", "speculators"):
            values = json.loads((config.run_folder / "exports" / name / "config.json").read_text())
            layer = values.get("transformer_layer_config", values)
            assert layer.get("sliding_window") == window
            assert layer.get("layer_types") == (["sliding_attention"] * 2 if window else None)
        served, _ = load_head(config.run_folder / "exports" / "plain")
        assert [served.config.window(layer) for layer in range(2)] == [window, window]
    assert "is complete" not in capsys.readouterr().out, "another window is another export"
    assert load_head(trained)[0].config.sliding_window is None
