"""What a server is asked, and what its answers and errors mean."""

import asyncio
import email.utils
import json
import time

import pytest
from fledge.conf.schema import Config, SynthesizeConfig, VerifierConfig, validate
from fledge.data_synthesis.answers.endpoint import Endpoint, RequestError, Window, read_answer, status_error
from fledge.data_synthesis.answers.verify_endpoint import request_body
from fledge.data_synthesis.tokens.chat_template import Turn
from servers import faulty_server


def test_a_window_doubles_a_round_trip_until_it_is_pushed_back_and_grows_by_one_from_there():
    window = Window(256)
    for expected in (32, 64, 128, 256, 256):
        for _ in range(window.size):
            window.grow()
        assert window.size == expected
    started = time.monotonic()
    for _ in range(100):  # all of them were on their way when the first was pushed back
        window.shrink(started)
    assert window.size == 128
    for _ in range(129):
        window.grow()
    assert window.size == 129
    for _ in range(100):
        window.shrink(time.monotonic())
    assert window.size == 1, "one is always asked"
    assert Window(4).size == 4


def test_few_push_backs_among_many_answers_do_not_narrow_a_window():
    window = Window(64)
    for number in range(2000):
        window.shrink(time.monotonic()) if number % 16 == 0 else window.grow()
    assert window.size == 64
    for number in range(2000):
        window.shrink(time.monotonic()) if number % 5 == 0 else window.grow()
    assert window.size < 32


def completion(**changes: object) -> dict:
    choice = {"message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop", **changes}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def test_an_answer_is_read_with_its_reasoning_and_its_tokens():
    for name in ("reasoning", "reasoning_content"):
        answer = read_answer(completion(message={"content": "Hi.", name: "hm"}))
        assert (answer.text, answer.reasoning, answer.turn) == ("Hi.", "hm", None)
    answer = read_answer({**completion(token_ids=[4, 5]), "prompt_token_ids": [1, 2, 3]})
    assert answer.turn == Turn([1, 2, 3], [4, 5])
    assert read_answer(completion(message={"content": None})).text == ""


@pytest.mark.parametrize(
    "response",
    [
        None,
        "<html>",
        [],
        {},
        {"choices": []},
        {**completion(), "usage": None},
        completion(message="Hi."),
        completion(message={"content": 5}),
        completion(message={"content": "half a character \ud83d"}),
        completion(finish_reason="abort"),
        completion(finish_reason=None),
    ],
)
def test_what_is_no_chat_completion_is_an_error_of_the_request(response):
    with pytest.raises(RequestError) as caught:
        read_answer(response)
    assert not caught.value.lasting, "it may go well elsewhere or later"


@pytest.mark.parametrize(
    ("missing", "response"),
    [
        ("usage.prompt_tokens", {**completion(), "usage": None}),
        ("usage.prompt_tokens", {name: value for name, value in completion().items() if name != "usage"}),
        ("usage.prompt_tokens", {**completion(), "usage": {"completion_tokens": 2}}),
        ("usage.completion_tokens", {**completion(), "usage": {"prompt_tokens": 2, "completion_tokens": None}}),
        ("choices[0].finish_reason", completion(finish_reason=None)),
        ("choices[0].finish_reason", {**completion(), "choices": [{"message": {"content": "Hi."}}]}),
    ],
)
def test_a_field_that_an_answer_lacks_is_named_with_what_needs_it(missing, response):
    with pytest.raises(RequestError) as caught:
        read_answer(response)
    assert (caught.value.reason, caught.value.lacking) == (f"an answer without {missing}", missing)
    assert caught.value.detail.startswith("which fledge needs to ")


def test_an_answer_that_tells_its_tokens_needs_no_usage():
    response = {**completion(token_ids=[4, 5]), "prompt_token_ids": [1, 2, 3], "usage": None}
    answer = read_answer(response)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)


def refused(status: int, message: str = "no", **headers: str) -> RequestError:
    return status_error(status, json.dumps({"error": {"message": message}}), headers)


def test_a_server_that_is_busy_says_for_how_long():
    assert refused(429, **{"retry-after": "7"}).pause_s == 7
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 17 < refused(503, **{"retry-after": date}).pause_s <= 20
    assert refused(429, **{"retry-after": "soon"}).pause_s == 0
    assert refused(429).busy
    assert refused(429).pushed_back
    assert not refused(500).busy
    assert not refused(500).lasting
    assert all(refused(never).lasting and refused(never).refuses_us for never in (501, 505))


def test_what_would_fail_again_is_told_from_what_may_pass():
    assert refused(400).lasting
    assert refused(401).refuses_us
    assert refused(400, "This model's maximum context length is 2048 tokens.").context_full
    assert not refused(400, "bad image").context_full


def test_greedy_requests_are_free_of_penalties_and_sampled_ones_as_asked():
    config = Config(
        name="x",
        verifier=VerifierConfig("v", chat_template_kwargs={"enable_thinking": False}),
        synthesize=SynthesizeConfig(temperature=0.7, top_p=0.9, request={"top_k": 20, "presence_penalty": 1.5}),
    )
    endpoint = Endpoint("http://localhost:1/v1", config.synthesize)
    endpoint.extras = {"repetition_penalty": 1.0, "top_k": -1}
    question = [{"role": "user", "content": "a?"}]
    sampled, greedy = (
        request_body(endpoint, config.synthesize, config.verifier, question, greedy) for greedy in (False, True)
    )
    assert (sampled["temperature"], sampled["top_p"], sampled["repetition_penalty"]) == (0.7, 0.9, 1.0)
    assert (sampled["top_k"], sampled["presence_penalty"]) == (20, 1.5)
    assert (greedy["temperature"], greedy["top_p"], greedy["repetition_penalty"]) == (0.0, 1.0, 1.0)
    assert "presence_penalty" not in greedy
    assert greedy["chat_template_kwargs"] == {"enable_thinking": False}
    assert greedy["messages"] == question


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"endpoints": ["localhost:8000"]},
            r"synthesize.endpoints\[0\] must be a base URL such as http://localhost:8000/v1",
        ),
        ({"endpoints": ["http://me:secret@host/v1"]}, "got host/v1"),
        ({"request": {"max_tokens": 5}}, "synthesize.request must leave max_tokens to fledge"),
        ({"shard": 2, "num_shards": 2}, "synthesize.shard must lie between 0 and synthesize.num_shards - 1 = 1, got 2"),
        ({"grace_s": -1.0}, "synthesize.grace_s must be at least 0"),
    ],
)
def test_options_without_sense_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        validate(Config(name="x", synthesize=SynthesizeConfig(**options)))
    assert "secret" not in str(caught.value)


def test_a_server_is_left_alone_for_as_long_as_it_asks():
    async def ask(endpoint: Endpoint) -> None:
        endpoint.revive()
        assert endpoint.free == 16
        with pytest.raises(RequestError, match="HTTP 429"):
            await endpoint.ask({"messages": [{"role": "user", "content": "a?"}], "max_tokens": 5})
        assert endpoint.paused
        assert endpoint.free == 0
        await asyncio.sleep(1.1)  # it asked for 0.05 s, or for a date a second away
        assert endpoint.free > 0
        await endpoint.close()

    with faulty_server(faults={"rate_limited": 1.0}) as url:
        asyncio.run(ask(Endpoint(url, SynthesizeConfig())))


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ('{"error": {"message": "not\\nso"}}', "Error code: 400 - not so"),
        ('{"message": "not so"}', "Error code: 400 - not so"),
        ('{"detail": "Not Found"}', "Error code: 400"),
        ('{"error": "not so"}', "Error code: 400"),
        ("[1]", "Error code: 400"),
        ("<html>", "Error code: 400"),
    ],
)
def test_what_a_server_says_of_a_refusal_is_told(text, detail):
    assert status_error(400, text, {}).detail == detail


def test_the_proxy_of_the_environment_is_used_but_for_what_it_leaves_out(monkeypatch):
    monkeypatch.setenv("http_proxy", "proxy:3128")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,.inside.org,localhost")
    asked = {
        url: Endpoint(url, SynthesizeConfig())._proxy
        for url in ("http://10.1.2.3:8000/v1", "http://gpu1.inside.org/v1", "http://localhost:8000/v1", "http://far/v1")
    }
    assert set(list(asked.values())[:3]) == {None}
    assert asked["http://far/v1"] == "http://proxy:3128"
    assert Endpoint("http://far/v1", SynthesizeConfig(), by_proxy=False)._proxy is None
