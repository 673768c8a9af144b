"""What the user types, and what is said when it is wrong: one sentence, exit code 2, no traceback."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from builders import Run, copy_parts
from fledge.conf.cli import COMMANDS, main
from fledge.conf.runtime.artifact import differences
from fledge.conf.runtime.launch import run as run_stages
from fledge.conf.schema import STAGES, Config, EvaluateEngine, validate
from fledge.conf.schema.describe import describe, merge_stages
from omegaconf import OmegaConf


def fails(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.strip()]
    assert len(errors) == 1, err
    assert errors[0].startswith("fledge: error: ")
    return errors[0]


def test_help_names_every_command_and_fits_a_screen(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)
    assert len(out.splitlines()) <= 40


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_two_screens_examples_and_every_option_of_its_groups(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    main([command, "--help"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120
    assert "\n  reads   " in out
    assert "\n  writes  " in out
    names = [option.name for option in merge_stages(describe(Config))]
    for group in filter(None, COMMANDS[command].groups):
        assert all(f"\n  {name}" in out for name in names if name.startswith(f"{group}."))


def test_every_example_of_a_commands_help_composes(monkeypatch):
    for name, command in COMMANDS.items():
        for example in command.examples:
            words = shlex.split(example)
            if words[0] == "torchrun" or {"-m", "--help"} & set(words):
                continue
            started = []
            monkeypatch.setitem(sys.modules, "nothing", SimpleNamespace(runs=started.append))
            monkeypatch.setitem(COMMANDS, name, replace(command, function="nothing:runs"))
            main(words[1:])
            assert isinstance(started[0], Config), example


def test_help_has_meaning_default_and_limits_of_every_option(capsys):
    shown: dict[str, str] = {}
    for option in merge_stages(describe(Config)):
        topic = option.name.partition(".")[0]
        if topic not in shown:
            main(["train", "--help", topic])
            shown[topic] = " ".join(capsys.readouterr().out.split())
        out = shown[topic]
        assert option.name in out
        assert " ".join(option.meaning.split()) in out
        assert option.limits in out
        assert option.default == "required" or f"{option.name}={option.default}" in out


def test_the_help_of_a_group_is_asked_for_by_its_name(capfd):
    main(["train", "--help", "draft"])
    assert capfd.readouterr().out.startswith("draft: The draft head to train")
    assert "did you mean train.lr?" in fails(capfd, "train", "--help", "train.lrr")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["train.lrr is not an option", "did you mean train.lr?", "allowed are"]),
        ("train.lr=fast", ["train.lr", "'fast'", "Float"]),
        ("tracking.wandb=cloud", ["tracking.wandb", "'cloud'", "online, offline, disabled"]),
        ("experiment=demoo", ["demoo", "demo llama31_405b_fp4 llama31_8b llama4_maverick"]),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage", "between 0 and 3", "4"]),
        ("train.dtype=bfloat16 deepspeed=zero0", ["deepspeed.zero_stage", "bfloat16"]),
        ("train.lr", ["train.lr", "missing EQUAL"]),
        ("draft.aux_layers=[]", ["draft.aux_layers", "at least one"]),
        ("draft.aux_layers=[1,1,3]", ["draft.aux_layers", "different layers", "[1, 1, 3]"]),
        ("draft.aux_layers=[-1,3]", ["draft.aux_layers", "counted from 0"]),
        ("draft.sliding_window=16 train.ttt_steps=17", ["train.ttt_steps", "draft.sliding_window=16", "got 17"]),
        ("draft.window_layers=[0]", ["draft.sliding_window is required", "draft.window_layers=[0]"]),
        ("draft.sliding_window=16 evaluate.num_draft_tokens=17", ["evaluate.num_draft_tokens", "window=16", "got 17"]),
        ("data.limit=0", ["data.limit must be at least 1", "got 0"]),
        ("cluster.server.hours=0", ["cluster.server.hours must be above 0", "got 0.0"]),
        ("train.dtype=float16", ["train.dtype must be float32 or bfloat16, got float16: its range"]),
        ("data.sources=[{path:embedded,limit:-5}]", ["data.sources[0].limit must be at least 1", "null", "got -5"]),
        ("data.min_turns=3 data.max_turns=2", ["data.max_turns must be at least data.min_turns=3", "got 2"]),
        ("data.min_chars=9 data.max_chars=8", ["data.max_chars must be at least data.min_chars=9", "got 8"]),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(capfd, override, words):
    message = fails(capfd, "train", "experiment=demo", "name=x", *override.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize("override", ["={date_string: 26 Jul 2024}", ".date_string=26 Jul 2024"])
def test_variables_of_a_chat_template_are_given_by_any_name_beside_those_of_the_experiment(capfd, override):
    main(["dump", "experiment=qwen3_8b", "name=x", f"verifier.chat_template_kwargs{override}", "--cfg", "job"])
    given = OmegaConf.create(capfd.readouterr().out).verifier.chat_template_kwargs
    assert given == {"date_string": "26 Jul 2024", "enable_thinking": False}


def test_a_malformed_row_of_the_large_public_datasets_is_counted_and_stops_nothing(capfd):
    main(["synthesize", "experiment=llama31_8b", "name=x", "--cfg", "job"])
    assert OmegaConf.create(capfd.readouterr().out).data.malformed_rows == "skip"


def test_a_missing_required_option_is_named(capfd):
    assert "name is required" in fails(capfd, "train", "experiment=demo")


def test_the_warnings_of_modules_that_were_loaded_before_a_command_are_still_heard(capfd, caplog):
    loaded = logging.getLogger("loaded_before")
    fails(capfd, "compare", "nowhere", "nowhere_else")
    loaded.warning("heard")
    assert caplog.messages == ["heard"]


def test_an_unknown_command_is_answered_with_the_commands(capfd):
    message = fails(capfd, "trian")
    assert "did you mean train?" in message
    assert "synthesize, dump, train" in message


@pytest.mark.parametrize("experiment", ["demo", "llama31_8b", "llama4_maverick"])
def test_every_experiment_composes_and_is_valid(experiment):
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("fledge.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [f"experiment={experiment}", "name=x"]))
    validate(config)
    if experiment == "llama4_maverick":
        assert config.draft.aux_layers == [1, 23, 44]
        assert config.draft.vocab_size is None
        assert config.evaluate.num_draft_tokens == 3
        assert [source.path for source in config.data.sources] == [
            "HuggingFaceH4/ultrachat_200k",
            "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
        ]


def test_run_leaves_an_evaluation_out_that_no_server_answers_yet(monkeypatch, capsys):
    begun: list[str] = []
    monkeypatch.setattr("fledge.conf.runtime.launch.HydraConfig", MagicMock())
    monkeypatch.setattr("fledge.conf.runtime.launch.run_stage", lambda command, _environments: begun.append(command[3]))
    config = Config(name="x")
    config.evaluate.engine = EvaluateEngine.server
    run_stages(config)
    assert begun == ["synthesize", "dump", "train", "export"]
    assert "[4/5] evaluate is left out" in capsys.readouterr().out
    config.evaluate.endpoint = "http://localhost:8000/v1"
    run_stages(config)
    assert begun[4:] == list(STAGES)


def says(run: Run, stage: str, *overrides: str) -> str:
    done = run(stage, *overrides, code=2)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fledge: error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_missing_folders_are_answered_with_the_command_to_run(run):
    assert "run `fledge synthesize` first" in says(run, "dump")
    assert "run `fledge dump` first" in says(run, "train")
    assert "run `fledge train` first" in says(run, "evaluate")
    assert "run `fledge train` first" in says(run, "export")
    assert "data.sources is required" in says(run, "synthesize", "data.sources=[]")
    assert "neither a model folder nor a reachable hub id" in says(run, "synthesize", "verifier.path=/no/such/folder")


@pytest.fixture(scope="module")
def other_verifier(tmp_path_factory, tiny_verifier_folder):
    """The same verifier with one matrix in its middle trained further, its norms untouched."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "verifier"
    shutil.copytree(tiny_verifier_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.self_attn.o_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_artifacts_of_another_verifier_are_refused(finished, run, other_verifier):
    copy_parts(finished, run, "conversations", "hidden_states", "training")
    for stage in ("dump", "train", "evaluate", "export"):
        assert "fingerprint" in says(run, stage, f"verifier.path={other_verifier}")


def test_a_verifier_without_a_chat_template_is_refused_before_anything_is_decoded(finished, run, tmp_path):
    copy_parts(finished, run, "training")
    bare = tmp_path / "bare"
    shutil.copytree(run.verifier, bare)
    (bare / "chat_template.jinja").unlink()
    for stage in ("synthesize", "evaluate"):
        message = says(run, stage, f"verifier.path={bare}")
        assert "has a tokenizer without a chat template, which fledge needs: take the chat (instruct) model" in message
    assert not (run.path / "evaluation").exists()


def test_questions_that_cannot_be_asked_are_refused_before_anything_is_decoded(finished, run, tmp_path):
    copy_parts(finished, run, "training")
    (tmp_path / "q.jsonl").write_text('{"turns": ["a?"]}\n{"turn": "b?"}\n')
    message = says(run, "evaluate", f"evaluate.questions={tmp_path / 'q.jsonl'}")
    assert "evaluate.questions: " in message
    assert "q.jsonl line 2 has the fields turn: " in message
    assert not (run.path / "evaluation").exists()


def test_a_corrupt_shard_stops_training_and_dump_makes_it_anew(finished, run):
    copy_parts(finished, run, "conversations", "hidden_states")
    shard = run.path / "hidden_states" / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "shard-00000.safetensors: loss_mask does not have its checksum" in says(run, "train")
    assert not (run.path / "training").exists()
    shard.unlink()
    assert "shard-00000.safetensors is missing" in says(run, "train")
    run("dump")
    assert shard.read_bytes() == whole


def test_a_malformed_conversation_line_is_named_and_its_removal_repaired(finished, run):
    copy_parts(finished, run, "conversations")
    path = run.path / "conversations" / "conversations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:]]))
    assert "conversations.jsonl line 5 is malformed" in says(run, "dump")
    path.write_text("".join(lines[:4] + lines[5:]))
    assert "run `fledge synthesize` again" in says(run, "dump")
    run("synthesize")
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())
    run("dump")


def test_other_settings_are_refused_by_name_and_overwrite_makes_anew(finished, run):
    copy_parts(finished, run, "conversations", "hidden_states")
    message = says(run, "dump", "dump.max_length=50")
    assert "max_length: 1024 -> 50" in message
    assert "overwrite=true" in message
    run("dump", "dump.max_length=50", "overwrite=true")
    manifest = json.loads((run.path / "hidden_states" / "manifest.json").read_text())
    assert manifest["settings"]["max_length"] == 50
    assert manifest["counts"]["too_long"] + manifest["counts"]["cut_answers"] > 0


def test_an_impossible_draft_vocabulary_is_refused_before_the_dump(finished, run):
    copy_parts(finished, run, "conversations")
    assert "draft.vocab_size must lie between 5 and the verifier's 600, got 9999" in says(
        run, "dump", "draft.vocab_size=9999"
    )
    assert not (run.path / "hidden_states").exists()


def test_another_draft_vocabulary_rewrites_only_the_map(finished, run):
    copy_parts(finished, run, "conversations", "hidden_states")
    assert "draft.vocab_size is 200" in says(run, "train", "draft.vocab_size=200")
    shard = run.path / "hidden_states" / "shard-00000.safetensors"
    before = shard.stat().st_mtime_ns
    run("dump", "draft.vocab_size=200")
    assert shard.stat().st_mtime_ns == before


def test_other_aux_layers_than_the_dumped_ones_are_refused(finished, run):
    copy_parts(finished, run, "conversations", "hidden_states")
    assert "draft.aux_layers is [0, 2, 5]" in says(run, "train", "draft.aux_layers=[0,2,5]")


def test_two_writers_of_one_folder_are_refused(run):
    from fledge.conf.runtime.artifact import artifact

    with artifact(run.path / "conversations", "conversations", {}):
        assert "is being written by another process" in says(run, "synthesize")


def test_a_foreign_folder_is_never_cleared(finished, run):
    folder = run.path / "conversations"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    assert "not fledge's to write" in says(run, "synthesize", "overwrite=true")
    assert (folder / "thesis.tex").read_text() == "mine"


def test_the_same_verifier_under_another_path_is_the_same(finished, run, tmp_path):
    copy_parts(finished, run, "conversations", "hidden_states", "training")
    shutil.copytree(run.verifier, tmp_path / "moved")
    for stage in ("synthesize", "dump", "train"):
        assert "is complete" in run(stage, f"verifier.path={tmp_path / 'moved'}").stdout


def test_a_killed_overwrite_is_not_taken_for_the_artifact_it_was_clearing(tmp_path, monkeypatch):
    from fledge.conf.runtime import artifact as module

    folder = tmp_path / "hidden_states"
    with module.artifact(folder, "hidden_states", {"a": 1}) as target:
        (folder / "shard").write_text("x")
        target.finish()
    with monkeypatch.context() as patched:  # killed in the middle of clearing
        patched.setattr(module.Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), module.artifact(folder, "hidden_states", {"a": 2}, overwrite=True):
            pass
    with module.artifact(folder, "hidden_states", {"a": 1}) as target:
        assert not target.complete
        assert not (folder / "shard").exists()


def test_parts_missing_from_complete_artifacts_are_made_again(finished, run):
    copy_parts(finished, run, "conversations", "hidden_states", "training", "evaluation", "exports")
    (run.path / "hidden_states" / "vocab_map.safetensors").unlink()
    assert "run `fledge dump` again" in says(run, "train", "train.lr=1e-2", "overwrite=true")
    assert (run.path / "training" / "checkpoints").exists(), "checked before anything is cleared"
    (run.path / "evaluation" / "acceptance.json").unlink()
    (run.path / "exports" / "plain" / "model.safetensors").unlink()
    run("dump")
    run("evaluate")
    run("export")
    for name in ("hidden_states/vocab_map.safetensors", "exports/plain/model.safetensors"):
        assert (run.path / name).read_bytes() == (finished.path / name).read_bytes()
    (run.path / "conversations" / "conversations.jsonl").unlink()
    assert "conversations.jsonl is missing" in says(run, "dump", "overwrite=true", "dump.max_length=90")


def test_an_export_never_replaces_a_foreign_folder(finished, run):
    copy_parts(finished, run, "training")
    (run.path / "exports" / "plain").mkdir(parents=True)
    (run.path / "exports" / "plain" / "notes").write_text("mine")
    assert "is not an export of fledge's" in says(run, "export")


def test_a_disk_that_cannot_be_written_is_one_sentence(run):
    assert "/proc/nope" in says(run, "synthesize", "runs_dir=/proc/nope")


def test_differences_name_nested_settings():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]


@pytest.mark.parametrize(
    ("entry", "said", "in_force"),
    [
        ("fledge", {}, "GOMP_SPINCOUNT = '2000'"),
        ("fledge.eval", {}, "GOMP_SPINCOUNT = '2000'"),
        ("fledge", {"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ("fledge", {"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
    ],
)
def test_waiting_threads_soon_leave_their_core_unless_the_user_says_how_they_wait(entry, said, in_force, tmp_path):
    """libgomp itself says what it has read, when torch loads it."""
    arguments = ["export"] * (entry == "fledge") + ["name=none", "verifier.path=none"]
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-m", entry, *arguments],
        env={**environment, **said, "OMP_DISPLAY_ENV": "VERBOSE"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, "the command loads torch, then finds no checkpoint"
    assert in_force in done.stderr, done.stderr
