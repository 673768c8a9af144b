"""A server is asked what it can before any row is: what it may lack, and what is refused."""

import asyncio
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from fledge.conf.schema import Config, SynthesizeConfig, VerifierConfig
from fledge.data_synthesis.answers.endpoint import Endpoint
from fledge.data_synthesis.answers.verify_endpoint import EndpointVerifier
from servers import tokens_of


@contextlib.contextmanager
def spare_server(model_list: int, **lacking: None):
    """Serve chats as the fault server does, its list of models with this status, answers without some fields."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):
            self.reply(model_list, {"data": []} if model_list == 200 else {"detail": "Not Found"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choice = {"message": {"content": "I", "role": "assistant"}, "finish_reason": "length"}
            usage = {"prompt_tokens": len(tokens_of(body["messages"])), "completion_tokens": 1}
            reply = {"choices": [{n: v for n, v in choice.items() if n not in lacking}], "usage": usage}
            self.reply(200, {name: value for name, value in reply.items() if name not in lacking})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def opened(endpoint_url: str, verifier: Path) -> Endpoint:
    options = SynthesizeConfig(endpoints=[endpoint_url], retries=1, max_tokens=16)
    config = Config(name="x", verifier=VerifierConfig(path=str(verifier)), synthesize=options)
    endpoint = Endpoint(endpoint_url, options)

    async def open_it() -> None:
        try:
            await EndpointVerifier(config.verifier, config.synthesize).open(endpoint)
        finally:
            await endpoint.close()

    asyncio.run(open_it())
    return endpoint


@pytest.mark.parametrize("status", [404, 405, 500, 200])
def test_a_server_that_lists_no_models_is_asked_all_the_same(byte_verifier, status):
    with spare_server(status) as url:
        endpoint = opened(url, byte_verifier)
    assert (endpoint.up, endpoint.model) == (True, str(byte_verifier))


@pytest.mark.parametrize(("field", "named"), [("usage", "usage.prompt_tokens"), ("finish_reason", "finish_reason")])
def test_a_server_whose_answers_lack_a_field_is_refused_with_what_needs_it(byte_verifier, field, named):
    with (
        spare_server(404, **{field: None}) as url,
        pytest.raises(ValueError, match=f"its answers lack .*{named}, which fledge needs to .*: use a server that"),
    ):
        opened(url, byte_verifier)
