"""Servers for the tests of regeneration: one that goes wrong in every way, and real ones with a model.

    python servers.py [--port 0] [--faults rate_limited=0.05,reset=0.02] [--model NAME] ...

prints its port. An answer repeats the last user turn and hashes all that was asked, so that `answer_to` says what it
must be, and an answer under another's id is seen. What must happen every time is asked for by a word in a user turn:
CUT (the answer ends early, finish_reason "length"), TOO LONG and REFUSED (400), EMPTY (an empty answer).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "faulty"
END = 256  # the end-of-turn token; a text's tokens are its bytes
FAULTS = (
    "rate_limited",  # 429 with Retry-After in seconds or as a date
    "unavailable",  # 503
    "error",  # 500
    "reset",  # before the answer
    "reset_within",  # in the middle of it
    "half",  # a body shorter than its content-length
    "html",  # with status 200
    "other_json",  # of another shape, with status 200
    "no_choice",  # an empty list of choices
    "torn_json",  # with a content-length that is right
    "not_utf8",
    "aborted",  # finish_reason "abort", as engines say of requests that they gave up
    "silent",  # no answer ever
    "slow",  # the right answer, a second late
)
SHARES = dict.fromkeys(FAULTS, 0.01) | {"rate_limited": 0.03, "silent": 0.003}  # a bad day


def answer_to(messages: list[dict[str, Any]]) -> str:
    """Give the answer to a conversation that ends with a user's turn."""
    asked = hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).hexdigest()[:16]
    return f"I was asked «{messages[-1]['content']}» ({asked})."


def tokens_of(messages: list[dict[str, Any]]) -> list[int]:
    """Give the tokens of a conversation up to where the next answer begins."""
    tokens: list[int] = []
    for message in messages:
        tokens += [*f"{message['role']}:{message['content']}".encode(), END]
    return [*tokens, *b"assistant:"]


class Faulty:
    """The server's state: what it is asked to do wrong, and what it did."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shares = dict(part.split("=") for part in options.faults.split(",") if part)
        assert set(self.shares) <= set(FAULTS), f"faults are {', '.join(FAULTS)}"
        self.generator = random.Random(options.seed)
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.connections: set[asyncio.StreamWriter] = set()
        self.server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Open the port."""
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", self.options.port)
        self.options.port = self.server.sockets[0].getsockname()[1]

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        self.connections.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (line[15:] for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0
                )
                body = await reader.readexactly(int(length))
                await self.respond(head.split(" ")[1], body, reader, writer)
                await writer.drain()
        self.connections.discard(writer)
        writer.close()

    async def respond(self, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        if path == "/stats":
            writer.write(http(200, dict(self.counts)))
        elif path == "/v1/models":
            writer.write(http(200, {"object": "list", "data": [{"id": self.options.model, "object": "model"}]}))
        elif path not in ("/v1/chat/completions", "/v1/completions"):
            writer.write(http(404, {"error": {"message": f"no {path} here", "code": 404}}))
        else:
            self.counts["requests"] += 1
            self.in_flight += 1
            self.counts["most_in_flight"] = max(self.counts["most_in_flight"], self.in_flight)
            try:
                await self.chat(json.loads(body), reader, writer)
            finally:
                self.in_flight -= 1

    async def chat(self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a chat completion, or do something wrong instead."""
        await self.end_or_pause()
        fault = self.draw()
        if self.in_flight > self.options.at_most:
            fault = "rate_limited"
        if self.options.latency_s:
            await asyncio.sleep(self.options.latency_s)
        if fault == "slow":
            await asyncio.sleep(1)
        if fault == "silent":
            await reader.read()  # until the client has had enough
        elif fault in ("reset", "reset_within"):
            if fault == "reset_within":
                writer.write(http(200, completion(request))[:-40])
                await writer.drain()
            reset(writer)
        else:
            writer.write(
                http(*self.completion_or_refusal(request)) if fault in (None, "slow") else wrong(fault, request)
            )
            if fault == "half":
                await writer.drain()
                writer.close()
        self.counts[fault or "as it should"] += 1

    def draw(self) -> str | None:
        """Choose what goes wrong with this request."""
        point = self.generator.random()
        for fault, share in self.shares.items():
            point -= float(share)
            if point < 0:
                return fault
        return None

    async def end_or_pause(self) -> None:
        """Die, or close the port and every connection for a while, after so many requests."""
        if self.counts["requests"] == self.options.die_after:
            os._exit(1)
        if self.counts["requests"] == self.options.pause_after:
            assert self.server is not None
            self.server.close()
            for writer in list(self.connections):
                reset(writer)
            await asyncio.sleep(self.options.pause_s)
            await self.listen()

    def completion_or_refusal(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Give the status and body of the right answer."""
        said = " ".join(str(m["content"]) for m in request.get("messages", []) if m["role"] == "user")
        if self.counts["requests"] == self.options.rename_after:
            self.options.model = "someone/else"
        if request["model"] != self.options.model:
            return 404, {"error": {"message": f"The model `{request['model']}` does not exist.", "code": 404}}
        if "TOO LONG" in said:
            return 400, {"error": {"message": "This model's maximum context length is 9 tokens.", "code": 400}}
        if "REFUSED" in said:
            return 400, {"error": {"message": "This request is not to our taste.", "code": 400}}
        if self.options.no_token_ids and isinstance(request.get("prompt"), list):
            return 400, {"error": {"message": "prompt must be a string.", "code": 400}}
        return 200, completion(request, offers_tokens=not self.options.no_token_ids)


def completion(request: dict[str, Any], offers_tokens: bool = True) -> dict[str, Any]:
    """Give the right answer to a request."""
    if "prompt" in request:
        return raw_completion(request, offers_tokens)
    last = str(request["messages"][-1]["content"])
    text = "" if "EMPTY" in last else answer_to(request["messages"])
    if "CUT" in last:
        text = text[:12]
    prompt, answer = tokens_of(request["messages"]), [*text.encode(), *([] if "CUT" in last else [END])]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if "CUT" in last else "stop",
    }
    body: dict[str, Any] = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer),
            "total_tokens": len(prompt) + len(answer),
        },
    }
    if request.get("return_token_ids") and offers_tokens:
        body["prompt_token_ids"], choice["token_ids"] = prompt, answer
    return body


def raw_completion(request: dict[str, Any], offers_tokens: bool) -> dict[str, Any]:
    """Go on after a raw prompt: a question by its seed, one in seven not to its end."""
    prompt = request["prompt"]
    if isinstance(prompt, str):
        first, *others = prompt.split("<end>")
        prompt = [*first.encode(), *(token for part in others for token in (END, *part.encode()))]
    text, ended = f"What is {request['seed'] % 997} by {request['seed'] % 7}?", request["seed"] % 7 > 0
    answer = [*text.encode(), *([END] if ended else [])]
    choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
    if request.get("return_token_ids") and offers_tokens:
        choice |= {"prompt_token_ids": prompt, "token_ids": answer}
    return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(answer)}}


def http(status: int, body: dict[str, Any] | bytes, *headers: str, length: int | None = None) -> bytes:
    """Give the bytes of a response."""
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    lines = [
        f"HTTP/1.1 {status} Whatever",
        "content-type: application/json",
        f"content-length: {len(content) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def wrong(fault: str, request: dict[str, Any]) -> bytes:
    """Give the bytes of a response with a fault."""
    right = completion(request)
    content = json.dumps(right, ensure_ascii=False).encode()
    error = {"error": {"message": f"made up: {fault}"}}
    if fault == "rate_limited":
        date = email.utils.formatdate(time.time() + 1, usegmt=True)
        return http(429, error, f"retry-after: {date if len(content) % 8 == 0 else 0.05}")
    if fault in ("unavailable", "error"):
        return http(503 if fault == "unavailable" else 500, error)
    if fault == "half":
        return http(200, content[: len(content) // 2], length=len(content))
    if fault == "html":
        return http(200, b"<html><body>Welcome to the proxy</body></html>").replace(b"application/json", b"text/html")
    if fault == "other_json":
        return http(200, {"object": "list", "data": [1, 2, 3]})
    if fault == "no_choice":
        return http(200, {**right, "choices": []})
    if fault == "torn_json":
        return http(200, content[:-20])
    if fault == "not_utf8":
        return http(200, content.replace("«".encode(), b"\xff\xfe"))
    assert fault == "aborted", fault
    right["choices"][0]["finish_reason"] = "abort"
    if "message" in right["choices"][0]:
        right["choices"][0]["message"]["content"] = "I was"
    return http(200, right)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, so that the client reads a reset."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def faulty_server(**options: Any) -> Iterator[str]:
    """Run a fault server in a process of its own; give its endpoint. `faults` is a dictionary of shares."""
    arguments = [sys.executable, __file__]
    for name, value in options.items():
        if name == "faults":
            value = ",".join(f"{fault}={share}" for fault, share in value.items())
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def stats(endpoint: str) -> dict[str, int]:
    """Ask a fault server what it did."""
    with urllib.request.urlopen(endpoint.removesuffix("/v1") + "/stats", timeout=10) as response:
        return json.load(response)


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def model_server(command: list[str], port: int, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a server with a model until it is healthy, then to the end of the block; give its endpoint."""
    endpoint = f"http://127.0.0.1:{port}/v1"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        while not healthy(endpoint):
            assert process.poll() is None, log.read_text()[-6000:]
            time.sleep(0.2)
        yield endpoint
    finally:
        process.terminate()
        process.wait()


def healthy(endpoint: str) -> bool:
    """Say whether a server answers its health check."""
    try:
        with urllib.request.urlopen(endpoint.removesuffix("/v1") + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="", help="name=share,... of " + ", ".join(FAULTS))
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--at-most", type=int, default=10**9, help="requests in flight; others are refused with 429")
    parser.add_argument("--die-after", type=int, default=-1, help="requests")
    parser.add_argument("--rename-after", type=int, default=-1, help="requests; then another model is served")
    parser.add_argument("--pause-after", type=int, default=-1, help="requests; then nobody listens for --pause-s")
    parser.add_argument("--pause-s", type=float, default=2.0)
    parser.add_argument("--no-token-ids", action="store_true")
    options = parser.parse_args()

    async def serve() -> None:
        server = Faulty(options)
        await server.listen()
        print(options.port, flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
