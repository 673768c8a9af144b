"""`fledge evaluate evaluate.engine=server`: whom it asks, what, and what it refuses. vLLM: test_serving_server.py.

SGLang and TensorRT-LLM are doubles here (sglang_double.py, trtllm_double.py): neither runs on a CPU.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import Config, EvaluateConfig, EvaluateEngine, SynthesizeConfig, VerifierConfig, validate
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.eval.evaluate import evaluate
from fledge.eval.served import client
from servers import faulty_server, free_port, model_server
from sglang_double import ACCEPTED, LETTER, SECRET, rounds, sglang_double
from trtllm_double import trtllm_double

TRIALS = 2  # requests that are no questions: before anything is written, and before the first question
QUESTIONS = [
    {"question_id": 1, "category": "math", "turns": ["What is one and one?", "And two more?"]},
    {"question_id": 2, "category": "stem", "turns": ["Why is the sky blue?"]},
]


@pytest.fixture
def configuration(tmp_path, verifier_config):
    """Make configurations of evaluations of two questions by a server."""
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))

    def make(endpoint: str, name: str = "run", model: str | None = None, **options: object) -> Config:
        values = {"questions": str(file), "max_tokens": 24, "engine": EvaluateEngine.server, **options}
        config = Config(
            name=name,
            runs_dir=str(tmp_path / "runs"),
            verifier=VerifierConfig(path=verifier_config.path),
            synthesize=SynthesizeConfig(model=model),
            evaluate=EvaluateConfig(endpoint=endpoint, **values),
        )
        config.tracking.wandb = config.tracking.wandb.disabled
        validate(config)
        return config

    return make


def results_of(config: Config) -> dict:
    return json.loads((config.run_folder / "evaluation" / "acceptance.json").read_text())


def records_of(config: Config) -> list[dict]:
    return list(read_journal(config.run_folder / "evaluation" / "questions.jsonl"))


def without_seconds(config: Config) -> list[dict]:
    records = sorted(records_of(config), key=lambda record: record["id"])
    for record in records:
        for answer in record["answers"]:
            del answer["drafters"]["trained head"]["seconds"]
    return records


# -- refused before any question is sent -------------------------------------------------------------------------------


def test_an_address_is_required_and_must_be_one(configuration):
    for endpoint, words in (
        (None, "evaluate.endpoint is required with evaluate.engine=server"),
        ("localhost:8000", "evaluate.endpoint must be a base URL such as http://localhost:8000/v1.*got localhost:8000"),
        ("http://me:key@host/v1", "without a key .*got host/v1$"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(configuration(endpoint))
    with pytest.raises(ValueError, match=r"evaluate\.engine must be server with evaluate\.endpoint"):
        configuration("http://host/v1", engine=EvaluateEngine.transformers)


def test_nobody_there(configuration):
    with pytest.raises(ValueError, match=r"evaluate\.endpoint: no server answers at http://127.* \(connection lost"):
        evaluate(configuration(f"http://127.0.0.1:{free_port()}/v1"))


def test_another_model(configuration, verifier_config):
    with (
        faulty_server(model="someone/else") as endpoint,
        pytest.raises(ValueError, match=f"serves someone/else and not verifier.path={verifier_config.path}"),
    ):
        evaluate(configuration(endpoint))


def test_a_server_that_tells_nothing_of_speculation(configuration, tmp_path, verifier_config):
    (tmp_path / "hub").mkdir()
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", verifier_config.path]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        model_server(command, port, tmp_path / "server.log", environment) as endpoint,
        pytest.raises(ValueError, match=f"{endpoint} tells nothing of speculation, neither at /metrics, as vLLM does"),
    ):
        evaluate(configuration(endpoint))


def test_an_sglang_without_a_head(configuration, verifier_config):
    with sglang_double(verifier_config.path, speculative_algorithm=None) as server:
        with pytest.raises(
            ValueError,
            match="draft head: start it with --speculative-algorithm EAGLE3, or set evaluate",
        ):
            evaluate(configuration(server.endpoint))
        assert server.asked == []
        config = configuration(server.endpoint)
    assert not config.run_folder.exists(), "or its settings would stand in the way of better ones"


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({}, {"num_draft_tokens": 4}, "than evaluate.num_draft_tokens=4: set evaluate.num_draft_tokens=3"),
        ({}, {"tree_depth": 2}, "than evaluate.tree_depth=2: set evaluate.tree_depth=null"),
        (
            {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16},
            {"num_draft_tokens": 15},
            "set evaluate.tree_depth=3 evaluate.tree_top_k=4",
        ),
    ],
)
def test_an_sglang_that_drafts_otherwise(configuration, verifier_config, there, here, words):
    with sglang_double(verifier_config.path, **there) as server:
        with pytest.raises(ValueError, match=words):
            evaluate(configuration(server.endpoint, **here))
        assert server.asked == []


def test_an_answer_that_has_no_room(configuration, verifier_config):
    with sglang_double(verifier_config.path) as server:
        with pytest.raises(
            ValueError, match=r"q/1: a prompt of \d+ tokens and an answer do not fit into the 512 tokens of http"
        ):
            evaluate(configuration(server.endpoint, max_tokens=500))
        assert len(server.asked) == 1, "the trial that is no question"


def test_questions_with_images(configuration, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "p.jsonl").write_text(json.dumps({"turns": ["What is it?"], "images": [str(tmp_path / "a.png")]}))
    with pytest.raises(ValueError, match=r"evaluate\.engine must be transformers for questions with images \(p/"):
        evaluate(configuration("http://127.0.0.1:9/v1", questions=str(tmp_path / "p.jsonl")))


# -- the double of SGLang ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_sglang_is_asked_the_tokens_of_the_template_and_its_counts_are_summed(configuration, verifier_config, older):
    tokenizer = transformers.AutoTokenizer.from_pretrained(verifier_config.path)
    with sglang_double("the-verifier", older=older) as server:
        config = configuration(server.endpoint, model="the-verifier")
        evaluate(config)
    asked = server.asked[TRIALS:]
    said = tokenizer.decode([LETTER] * 24)
    first, second = ({"role": "user", "content": turn} for turn in QUESTIONS[0]["turns"])
    third = {"role": "user", "content": QUESTIONS[1]["turns"][0]}
    histories = [[first], [first, {"role": "assistant", "content": said}, second], [third]]
    assert [body["input_ids"] for body in asked] == [prompt_tokens(tokenizer, history) for history in histories]
    assert all(body["sampling_params"]["temperature"] == 0 for body in asked)
    assert all(body["sampling_params"]["max_new_tokens"] == 24 for body in asked)
    assert all(tokenizer.eos_token_id in body["sampling_params"]["stop_token_ids"] for body in asked)
    taken, results = rounds(24) * 3, results_of(config)
    assert results["num_drafts"] == len(taken)
    assert results["num_draft_tokens"] == 3 * len(taken)
    assert results["num_accepted_tokens"] == sum(taken)
    assert results["num_accepted_tokens_per_pos"] == [sum(n > position for n in taken) for position in range(3)]
    assert results["acceptance_length"] == 1 + sum(taken) / len(taken)
    assert (results["engine"], results["model"]) == ("sglang 0.0-double", "the-verifier")
    assert "as SGLang counts" in results["definition"]
    assert (results["dtype"], results["head"], results["speedup"]) == (None, None, None)
    assert set(ACCEPTED) <= set(taken), "or some rounds were never put to the test"


def test_several_questions_at_a_time_give_the_same_records(configuration, verifier_config):
    with sglang_double(verifier_config.path) as server:
        one, two = configuration(server.endpoint), configuration(server.endpoint, name="two", batch_size=2)
        evaluate(one)
        evaluate(two)
    assert without_seconds(one) == without_seconds(two)
    assert results_of(two)["tokens_per_s"] > 0


def test_a_server_without_a_head_is_measured_with_no_draft_tokens(configuration, verifier_config):
    lacks = dict.fromkeys(f"speculative_{name}" for name in ("algorithm", "num_steps", "num_draft_tokens"))
    with sglang_double(verifier_config.path, **lacks) as server:
        config = configuration(server.endpoint, num_draft_tokens=0, batch_size=2)
        evaluate(config)
    results = results_of(config)
    assert (results["num_drafts"], results["acceptance_length"]) == (0, 1.0)
    assert results["tokens_per_s"] > 0
    with pytest.raises(
        ValueError, match=r"evaluate\.num_draft_tokens must be at least 1 without evaluate\.engine=server"
    ):
        configuration(None, engine=EvaluateEngine.transformers, num_draft_tokens=0)


def test_a_tree_is_counted_by_depth(configuration, verifier_config):
    shape = {"num_draft_tokens": 15, "tree_depth": 3, "tree_top_k": 4}
    there = {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16}
    with sglang_double(verifier_config.path, older=True, **there) as server:
        config = configuration(server.endpoint, **shape)
        evaluate(config)
    results, taken = results_of(config), rounds(24) * 3
    assert (results["drafting"], results["num_draft_tokens"]) == ("tree", 15 * len(taken))
    assert results["num_accepted_tokens_per_pos"] == [sum(n > position for n in taken) for position in range(3)]


def test_a_server_that_dies_leaves_what_is_done_and_the_same_command_goes_on(configuration, verifier_config, capsys):
    with sglang_double(verifier_config.path, die_after=TRIALS + 2) as server:
        config = configuration(server.endpoint)
        with pytest.raises(SystemExit) as stopped:
            evaluate(config)
    assert stopped.value.code == 75
    assert f"{server.endpoint} does not answer any more (connection lost" in capsys.readouterr().err
    assert [record["id"] for record in records_of(config)] == ["q/1"]
    with sglang_double(verifier_config.path) as server:  # at another address
        evaluate(configuration(server.endpoint))
        assert len(server.asked) == 2, "a trial, and the second question"
    assert [record["id"] for record in records_of(config)] == ["q/1", "q/2"]
    evaluate(configuration("http://127.0.0.1:9/v1"))  # complete: nobody is asked


def test_a_server_that_has_too_much_to_do_is_asked_again(configuration, verifier_config, monkeypatch):
    monkeypatch.setattr("fledge.eval.served.client._PUSHED_BACK_S", 0.01)
    with sglang_double(verifier_config.path) as server:
        config = configuration(server.endpoint, batch_size=2)
        opened = client._Client._write_engine

        def busy_from_here(*arguments):
            server.busy = 3
            opened(*arguments)

        monkeypatch.setattr(client._Client, "_write_engine", busy_from_here)
        evaluate(config)
        assert server.busy == 0
    assert {record["id"]: len(record["answers"]) for record in records_of(config)} == {"q/1": 2, "q/2": 1}


def test_another_engine_does_not_go_on_with_what_one_has_begun(configuration, verifier_config):
    with sglang_double(verifier_config.path, die_after=TRIALS + 2) as server, pytest.raises(SystemExit):
        evaluate(configuration(server.endpoint))
    with (
        sglang_double(verifier_config.path, version="0.1") as server,
        pytest.raises(ValueError, match=r"was begun with sglang 0.0-double serving .* and http.* is sglang 0.1"),
    ):
        evaluate(configuration(server.endpoint))


def test_a_servers_own_key_is_written_nowhere(configuration, verifier_config):
    with sglang_double(verifier_config.path) as server:
        config = configuration(server.endpoint)
        evaluate(config)
        assert server.info["api_key"] == SECRET
    files = [path for path in config.run_folder.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_a_head_of_another_verifier_cannot_be_named(configuration, finished, tmp_path):
    checkpoints = finished.path / "training" / "checkpoints"
    head = tmp_path / "head"
    shutil.copytree(checkpoints / (checkpoints / "best").read_text().strip(), head)
    record = (head / "fledge.json").read_text()
    (head / "fledge.json").write_text(record.replace('"chat_template": "', '"chat_template": "0'))
    with pytest.raises(ValueError, match=r"evaluate\.checkpoint: .* was trained for another verifier .*chat_template"):
        evaluate(configuration("http://127.0.0.1:9/v1", checkpoint=str(head)))


# -- the double of TensorRT-LLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_tensorrt_llms_counts_are_summed(configuration, verifier_config, batch_size):
    with trtllm_double(verifier_config.path) as server:
        config = configuration(server.endpoint, batch_size=batch_size)
        evaluate(config)
    taken, results = rounds(24) * 3, results_of(config)
    assert (results["num_drafts"], results["num_accepted_tokens"]) == (len(taken), sum(taken))
    assert results["num_accepted_tokens_per_pos"] == [sum(n > position for n in taken) for position in range(3)]
    assert (results["engine"], results["model"]) == ("tensorrt_llm 0.0-double", verifier_config.path)
    assert "as TensorRT-LLM counts" in results["definition"]


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({"stats": False}, {}, "do not tell speculative_decoding: set per_request_spec_decode_stats: true"),
        ({"num_spec_tokens": 4}, {}, "it drafts 4 tokens a round, and evaluate.num_draft_tokens is 3"),
        ({"num_spec_tokens": None}, {}, "it drafts a varying number of tokens a round"),
        ({}, {"num_draft_tokens": 3, "tree_depth": 2}, "evaluate.tree_depth must be null with a TensorRT-LLM"),
    ],
)
def test_a_tensorrt_llm_that_cannot_be_measured(configuration, verifier_config, there, here, words):
    with trtllm_double(verifier_config.path, **there) as server:
        config = configuration(server.endpoint, **here)
        with pytest.raises(ValueError, match=words):
            evaluate(config)
    assert not config.run_folder.exists()
