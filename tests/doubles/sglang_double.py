"""A double of SGLang's HTTP interface: no model, the documented wire format. Nothing of SGLang itself runs on a CPU.

Every answer is the same letter over and over, as long as it may be; its rounds accept 0, 1, 3, 0, ... draft tokens.
"""

from __future__ import annotations

import itertools
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from json_server import JsonHandler, running

ACCEPTED = (0, 1, 3)
LETTER = 70  # a token
SECRET = "the-servers-own-key"
NOT_FOUND = 404, {"detail": "Not Found"}


def rounds(limit: int) -> list[int]:
    """Give the accepted tokens of each round of an answer of `limit` tokens; the last ends where the answer does."""
    taken, written = [], 1
    for accepted in itertools.cycle(ACCEPTED):
        if written >= limit:
            return taken
        taken.append(min(accepted, limit - written - 1))
        written += taken[-1] + 1
    raise AssertionError


def meta_info(prompt: list[int], limit: int, older: bool = False) -> dict[str, Any]:
    """Give what an answer of `limit` tokens tells; an older server names the histogram otherwise and tells no sums."""
    taken = rounds(limit)
    histogram = [taken.count(number) for number in range(max(taken, default=0) + 1)]
    newer = {"spec_num_correct_drafts": sum(taken), "spec_num_proposed_drafts": 3 * len(taken)}
    told = {
        "spec_verify_ct": len(taken),
        "spec_accept_length": limit / max(1, len(taken)),
        "spec_accept_histogram": histogram,
        **({} if older else {**newer, "spec_correct_drafts_histogram": histogram}),
    }
    return {
        "id": "0",
        "finish_reason": {"type": "length", "length": limit},
        "prompt_tokens": len(prompt),
        "completion_tokens": limit,
        "cached_tokens": 0,
        "e2e_latency": 0.1,
        **(told if taken else {}),
    }


class SglangDouble(ThreadingHTTPServer):
    """What it serves, what it was asked, and after how many requests it dies."""

    def __init__(self, model: str, older: bool, die_after: int, **info: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.model, self.older, self.die_after = model, older, die_after
        self.asked: list[dict[str, Any]] = []
        self.busy = 0  # requests that it turns away
        self.info = {
            "version": "0.0-double",
            "api_key": SECRET,
            "speculative_algorithm": "EAGLE3",
            "speculative_num_steps": 3,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": 4,
            **info,
        }


class _Handler(JsonHandler, BaseHTTPRequestHandler):
    server: SglangDouble

    def do_GET(self) -> None:
        card = {"id": self.server.model, "object": "model", "root": self.server.model, "max_model_len": 512}
        info_path = "/get_server_info" if self.server.older else "/server_info"
        known: dict[str, Any] = {"/v1/models": {"object": "list", "data": [card]}, info_path: self.server.info}
        self.answer(*(200, known[self.path]) if self.path in known else NOT_FOUND)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/generate":
            self.answer(*NOT_FOUND)
            return
        if self.server.busy:
            self.server.busy -= 1
            self.answer(503, {"detail": "busy"})
            return
        self.server.asked.append(body)
        if len(self.server.asked) > self.server.die_after:
            self.close_connection = True
            self.connection.close()
            return
        limit = body["sampling_params"]["max_new_tokens"]
        meta = meta_info(body["input_ids"], limit, self.server.older)
        meta = meta if self.server.info["speculative_algorithm"] else {**meta, "spec_verify_ct": 0}
        self.answer(200, {"text": "?", "output_ids": [LETTER] * limit, "meta_info": meta})


def sglang_double(
    model: str, older: bool = False, die_after: int = 10**9, **info: Any
) -> AbstractContextManager[SglangDouble]:
    """Run a double in a thread; `info` are fields of its /server_info."""
    return running(SglangDouble(model, older, die_after, **info))
