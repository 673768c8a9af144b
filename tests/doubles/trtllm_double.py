"""A double of TensorRT-LLM's HTTP interface: no model, the wire format of `trtllm-serve`. None of it runs on a CPU.

Every answer is the same letter over and over; its rounds accept what those of the double of SGLang do.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from json_server import JsonHandler, running
from sglang_double import LETTER, rounds

# Of its CompletionRequest, which forbids others.
FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
FIELDS |= {"stop_token_ids", "detokenize"}


def speculative_decoding(limit: int, num_spec_tokens: int | None = 3) -> dict[str, Any] | None:
    """Give what the choice of an answer of `limit` tokens tells; an answer that drafted nothing tells nothing."""
    taken = rounds(limit)
    if not taken:
        return None
    drafted = 3 * len(taken)
    return {
        "acceptance_rate": sum(taken) / drafted,
        "total_accepted_draft_tokens": sum(taken),
        "total_draft_tokens": drafted,
        "num_spec_steps": len(taken),
        "acceptance_histogram": [taken.count(number) for number in range(4)],
        "num_spec_tokens": num_spec_tokens,
    }


class TrtllmDouble(ThreadingHTTPServer):
    """What it serves, and what it was asked."""

    def __init__(self, model: str, stats: bool, num_spec_tokens: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.model, self.stats, self.num_spec_tokens = model, stats, num_spec_tokens
        self.asked: list[dict[str, Any]] = []


class _Handler(JsonHandler, BaseHTTPRequestHandler):
    server: TrtllmDouble

    def do_GET(self) -> None:
        card = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "tensorrt_llm"}
        known = {"/v1/models": {"object": "list", "data": [card]}, "/version": {"version": "0.0-double"}}
        known |= {"/metrics": []} if self.server.stats else {}
        self.answer(200 if self.path in known else 404, known.get(self.path, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        if self.path != "/v1/completions" or set(body) - FIELDS or body["top_k"] < 0 or body["detokenize"]:
            self.answer(400, {"object": "error", "message": "Extra inputs are not permitted", "code": 400})
            return
        limit = body["max_tokens"]
        choice = {"index": 0, "text": "", "token_ids": [LETTER] * limit, "finish_reason": "length"}
        choice |= {"avg_decoded_tokens_per_iter": limit / max(1, len(rounds(limit)))}
        told = speculative_decoding(limit, self.server.num_spec_tokens) if self.server.stats else None
        choice |= {"speculative_decoding": told} if told else {}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": limit}
        self.answer(200, {"object": "text_completion", "choices": [choice], "usage": usage})


def trtllm_double(
    model: str, stats: bool = True, num_spec_tokens: int | None = 3
) -> AbstractContextManager[TrtllmDouble]:
    """Run a double in a thread; `stats` is its per_request_spec_decode_stats."""
    return running(TrtllmDouble(model, stats, num_spec_tokens))
