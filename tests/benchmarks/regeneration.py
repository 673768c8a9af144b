"""Measure what regeneration costs beside the server: `python tests/benchmarks/regeneration.py [option=value ...]`.

Runs `fledge synthesize` on made-up rows against a server without a model, each in a process of its own, and prints one
JSON line. With `latency_s=0` the server answers at once and the client is the bound; else it works on `at_once`
requests at a time, `latency_s` seconds each, so that its own throughput is at_once / latency_s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from benchmark_options import parse_options
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.models.verifier.config import load_tokenizer
from transformers import PreTrainedTokenizerBase

MODEL = "benchmark"
SAMPLE_EVERY_S = 0.25


@dataclass
class Options:
    """What is measured."""

    rows: int = 20_000
    turns: int = 2
    prompt_chars: int = 400
    answer_chars: int = 600
    token_ids: bool = False  # the server gives token ids, one for four characters
    latency_s: float = 0.0  # of an answer; 0: at once
    at_once: int = 256  # requests the server works on at a time, where an answer takes time
    concurrency: int = 256  # requests the client has in flight
    seed: int = 0
    verifier: str = "embedded"  # whose tokens the server claims to read; it runs nowhere
    profile: str = ""  # file for the client's cProfile; it slows the client down
    overrides: str = ""  # further options of `fledge synthesize`, separated by blanks


def parse(arguments: list[str]) -> Options:
    """Read `name=value` arguments."""
    return parse_options(arguments, Options())


class Server(asyncio.Protocol):
    """One connection of a server that gives every chat completion the same prebuilt answer.

    Only of a short request, such as `fledge synthesize` sends first to see what it talks to, are the tokens told right.
    """

    def __init__(self, queue: Queue, options: Options, answer: bytes, tokenizer: PreTrainedTokenizerBase) -> None:
        self._queue, self._options, self._answer, self._tokenizer = queue, options, answer, tokenizer
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head := self._received.find(b"\r\n\r\n")) >= 0:
            length, start = 0, self._received.lower().find(b"content-length:", 0, head)
            if start >= 0:
                length = int(self._received[start + 15 : head].split(b"\r\n", 1)[0])
            if len(self._received) < head + 4 + length:
                return
            line, body = self._received[:head], self._received[head + 4 : head + 4 + length]
            self._received = self._received[head + 4 + length :]
            self._answer_one(line, body)

    def _answer_one(self, line: bytes, body: bytes) -> None:
        if not line.startswith(b"POST"):
            models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            self._transport.write(_http(self._queue.stats() if line.startswith(b"GET /stats") else models))
        elif len(body) < self._options.prompt_chars:
            tokens = prompt_tokens(self._tokenizer, json.loads(body)["messages"])
            self._transport.write(_http(_answer(self._options, tokens)))
        else:
            self._queue.put(lambda: self._transport.write(self._answer))


class Queue:
    """The requests a server works on: `at_once` of them, `latency_s` each, the others wait their turn."""

    def __init__(self, latency_s: float, at_once: int) -> None:
        self._latency_s, self._at_once = latency_s, at_once
        self._working, self._waiting = 0, deque[Callable[[], None]]()
        self._requests = self._answers = self._most = 0
        self._first_s = self._last_s = 0.0

    def put(self, reply: Callable[[], None]) -> None:
        """Take a request, whose answer `reply` writes."""
        self._first_s = self._first_s or time.monotonic()
        self._requests += 1
        self._most = max(self._most, self._requests - self._answers)
        if not self._latency_s:
            self._done(reply)
        elif self._working < self._at_once:
            self._start(reply)
        else:
            self._waiting.append(reply)

    def stats(self) -> dict[str, float]:
        """Give what happened so far."""
        return {
            "requests": self._requests,
            "answers": self._answers,
            "most_in_flight": self._most,
            "elapsed_s": self._last_s - self._first_s,
            "cpu_s": time.process_time(),
        }

    def _start(self, reply: Callable[[], None]) -> None:
        self._working += 1
        asyncio.get_running_loop().call_later(self._latency_s, self._end, reply)

    def _end(self, reply: Callable[[], None]) -> None:
        self._working -= 1
        self._done(reply)
        if self._waiting:
            self._start(self._waiting.popleft())

    def _done(self, reply: Callable[[], None]) -> None:
        reply()
        self._answers += 1
        self._last_s = time.monotonic()


def _http(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content


def _answer(options: Options, prompt: list[int]) -> dict[str, Any]:
    text = _words(random.Random(options.seed), options.answer_chars)
    num_prompt, num_answer = len(prompt), options.answer_chars // 4
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    answer: dict[str, Any] = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
        },
    }
    if options.token_ids:
        choice["token_ids"] = [7] * num_answer
        answer["prompt_token_ids"] = prompt
    return answer


def _serve(options: Options, port: Connection) -> None:
    async def serve() -> None:
        queue = Queue(options.latency_s, options.at_once)
        answer = _http(_answer(options, [5] * (options.prompt_chars // 4)))
        tokenizer = load_tokenizer(VerifierConfig(options.verifier))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Server(queue, options, answer, tokenizer), "127.0.0.1", 0, backlog=1024
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def serving(options: Options) -> Iterator[str]:
    """Run the server in a process of its own; give its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(options, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def stats(address: str) -> dict[str, float]:
    """Ask the server what it did."""
    with urllib.request.urlopen(f"{address}/stats", timeout=10) as response:
        return json.load(response)


def _words(generator: random.Random, chars: int) -> str:
    words = ("".join(generator.choices("aeioulmnrst", k=generator.randint(2, 9))) for _ in range(chars))
    text = ""
    while len(text) < chars:
        text += next(words) + " "
    return text[: chars - 1] + "."


def write_rows(path: Path, options: Options) -> None:
    """Write made-up prompts, no two of which say the same."""
    generator = random.Random(options.seed)
    with open(path, "w") as file:
        for number in range(options.rows):
            turns = [_words(generator, options.prompt_chars) for _ in range(options.turns)]
            file.write(json.dumps({"id": str(number), "turns": turns}) + "\n")


def _command(options: Options, address: str, folder: Path) -> list[str]:
    profiled = ["-m", "cProfile", "-o", options.profile] if options.profile else []
    return [
        *(sys.executable, *profiled, "-m", "fledge", "synthesize"),
        *("experiment=demo", "name=benchmark", f"runs_dir={folder}", f"data.sources=[{{path:{folder}/rows.jsonl}}]"),
        *(f"synthesize.endpoints=[{address}/v1]", f"synthesize.model={MODEL}"),
        f"verifier.path={options.verifier}",
        f"synthesize.concurrency={options.concurrency}",
        *options.overrides.split(),
    ]


def measure(options: Options) -> dict[str, Any]:
    """Regenerate made-up rows; give rates, CPU time a request and memory."""
    with tempfile.TemporaryDirectory() as temporary, serving(options) as address:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", options)
        with subprocess.Popen(_command(options, address, folder), stdout=sys.stderr) as client:
            samples = [_sample(client.pid, address)]
            while client.poll() is None:
                time.sleep(SAMPLE_EVERY_S)
                samples.append(_sample(client.pid, address) or samples[-1])
        if client.returncode:
            raise RuntimeError(f"fledge synthesize ended with exit code {client.returncode}")
        served = stats(address)
        ids = {record["id"] for record in read_journal(folder / "benchmark/conversations/conversations.jsonl")}
        assert len(ids) == options.rows, f"{len(ids)} of {options.rows} rows were answered"
    result = {**dataclasses.asdict(options), **_figures(options, samples, served)}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def _figures(options: Options, samples: list[dict[str, float]], served: dict[str, float]) -> dict[str, float]:
    """Give rates and CPU times between a tenth of the answers and the last, when everything has started, and memory."""
    total = options.rows * options.turns
    early = next(sample for sample in samples if sample["answers"] >= total / 10)
    late = next((sample for sample in samples if sample["answers"] >= total), samples[-1])
    grown = {name: late[name] - early[name] for name in late}
    num = grown["answers"]
    figures = {
        "requests": served["answers"],
        "requests_per_s": num / grown["at_s"],
        "client_cpu_ms_per_request": 1e3 * grown["client_cpu_s"] / num,
        "server_cpu_ms_per_request": 1e3 * grown["cpu_s"] / num,
        "rss_mib_at_a_tenth": early["rss_mib"],
        "rss_mib_at_the_last_answer": late["rss_mib"],
        "rss_mib_at_most": max(sample["rss_mib"] for sample in samples),
        "most_in_flight": served["most_in_flight"],
    }
    if options.latency_s:
        own = options.at_once / options.latency_s
        figures["share_of_the_servers_throughput"] = figures["requests_per_s"] / own
        figures["share_with_start_and_end"] = served["answers"] / served["elapsed_s"] / own
    return figures


def _sample(pid: int, address: str) -> dict[str, float]:
    """Read the clocks of both processes and the client's memory; empty where the client has ended."""
    try:
        process = psutil.Process(pid)
        times, memory = process.cpu_times(), process.memory_info()
    except psutil.NoSuchProcess:
        return {}
    client = {"client_cpu_s": times.user + times.system, "rss_mib": memory.rss / 2**20}
    return {"at_s": time.monotonic(), **client, **stats(address)}


if __name__ == "__main__":
    print(json.dumps(measure(parse(sys.argv[1:]))))
