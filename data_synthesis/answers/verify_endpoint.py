"""What a server is asked, and the proof that it is the verifier who answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ...conf.schema import SELF, SourceConfig, SynthesizeConfig, VerifierConfig
from ...models.verifier.config import load_config, load_end_token_ids, load_tokenizer, verifier_location
from ..tokens.chat_template import Message, check_template, prompt_tokens
from .conversation import Answer
from .endpoint import Endpoint, RequestError

_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")  # they make greedy less than greedy
# Sent to servers that take them: engines read defaults from the verifier's generation_config.json, penalties included.
_EXTRAS = {"return_token_ids": True, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0}
_PROBE: list[Message] = [{"role": "user", "content": "Name a colour."}]
_PROBE_PAUSE_S, _PATIENCE_S = 0.1, 20.0
_T = TypeVar("_T")


class EndpointVerifier:
    """Opens endpoints; a request is sent only to one that serves the verifier and reads chats as its template says."""

    def __init__(
        self, verifier: VerifierConfig, options: SynthesizeConfig, sources: Sequence[SourceConfig] = ()
    ) -> None:
        self._verifier, self._options = verifier, options
        written = {f"data.sources[{n}].max_tokens": s.max_tokens for n, s in enumerate(sources) if s.path == SELF}
        self._most_tokens = {"synthesize.max_tokens": options.max_tokens, **written}
        self._positions = load_config(verifier).max_position_embeddings
        self.tokenizer = load_tokenizer(verifier)

    async def open(self, endpoint: Endpoint) -> None:
        """Check that an endpoint serves the verifier, find out what it takes, and put it into service.

        Raises RequestError if it does not answer, ValueError if it serves another model or reads chats otherwise.
        """
        options = self._options
        try:
            ours = prompt_tokens(self.tokenizer, _PROBE)  # anew each time: a template may write the date
            await self._patiently(partial(find_model, endpoint, options.model, self._verifier, self._positions))
            for option, most in self._most_tokens.items():
                if len(ours) + most > endpoint.max_context:
                    raise ValueError(
                        f"{option}={most} leaves no room for a prompt in the {endpoint.max_context} tokens of "
                        f"{endpoint.url}: lower it, or start the server with a longer context"
                    )
            answer = await self._probe(endpoint)
        except RequestError as trouble:
            if trouble.lasting or trouble.lacking:
                raise ValueError(refusal(endpoint, trouble)) from None
            raise
        theirs = answer.turn.prompt if answer.turn else None
        if answer.prompt_tokens != len(ours) or (theirs is not None and theirs != ours):
            raise ValueError(
                f"{endpoint.url} reads a chat as other tokens than verifier.path={self._verifier.path} "
                f"({theirs or answer.prompt_tokens} for {ours if theirs else len(ours)}): it serves another model, or "
                "has another chat template; both must be the same, or no loss mask is right"
            )
        if answer.turn is None:  # then the template must tell what the verifier wrote
            check_template(self.tokenizer, load_end_token_ids(self._verifier, self.tokenizer))
        endpoint.revive()

    async def _probe(self, endpoint: Endpoint) -> Answer:
        """Send small requests of each kind that will be sent, with the extra fields that the server takes."""
        if answer := await self._ask_with(endpoint, _EXTRAS):
            return answer
        taken = {name: value for name, value in _EXTRAS.items() if await self._ask_with(endpoint, {name: value})}
        endpoint.extras = taken
        return await self._ask_each_kind(endpoint)

    async def _ask_with(self, endpoint: Endpoint, extras: dict[str, Any]) -> Answer | None:
        endpoint.extras = extras
        try:
            return await self._ask_each_kind(endpoint)
        except RequestError as trouble:
            if not trouble.final:
                raise
            return None

    async def _ask_each_kind(self, endpoint: Endpoint) -> Answer:
        for greedy in (True, self._options.temperature == 0):
            body = {**request_body(endpoint, self._options, self._verifier, _PROBE, greedy), "max_tokens": 1}
            answer = await self._patiently(partial(endpoint.ask, body))
        return answer

    async def _patiently(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        began, tries = time.monotonic(), 0
        while True:
            try:
                return await ask()
            except RequestError as trouble:
                tries += 1
                late = time.monotonic() - began > _PATIENCE_S
                if trouble.lasting or late or tries > self._options.retries:
                    raise
                await asyncio.sleep(max(trouble.pause_s, _PROBE_PAUSE_S))


def request_body(
    endpoint: Endpoint, options: SynthesizeConfig, verifier: VerifierConfig, question: list[Message], greedy: bool
) -> dict[str, Any]:
    """Return the request; a greedy one without whatever makes it less than greedy."""
    return {
        "messages": question,
        "max_tokens": options.max_tokens,
        "temperature": 0.0 if greedy else options.temperature,
        "top_p": 1.0 if greedy else options.top_p,
        **({"chat_template_kwargs": verifier.chat_template_kwargs} if verifier.chat_template_kwargs else {}),
        **endpoint.extras,
        **{name: value for name, value in options.request.items() if not (greedy and name in _PENALTIES)},
    }


async def find_model(endpoint: Endpoint, name: str | None, verifier: VerifierConfig, positions: int) -> None:
    """Set an endpoint's name for the verifier, and its context; a server that lists none will refuse a wrong name.

    `name` is synthesize.model, `positions` the tokens that the verifier can read. Raises RequestError if the server
    does not answer, ValueError if it serves something else.
    """
    served, required = await endpoint.models(), name or verifier_location(verifier)
    matching = [model for model in served if required in (model.get("id"), model.get("root"))]
    if served and not matching:
        raise ValueError(
            f"{endpoint.url} serves {', '.join(sorted(str(model.get('id')) for model in served))} and not "
            f"{'synthesize.model' if name else 'verifier.path'}={required}: start it with the verifier, or set "
            "synthesize.model to the verifier's name there"
        )
    model = matching[0] if matching else {}
    endpoint.model = str(model.get("id") or required)
    endpoint.max_context = min(positions, model.get("max_model_len") or positions)


def refusal(endpoint: Endpoint, trouble: RequestError) -> str:
    """Return the sentence that a server does not want what we ask, or does not give it."""
    if trouble.lacking:
        return (
            f"{endpoint.url}: its answers lack {trouble.lacking}, {trouble.detail}: use a server that sends it, as "
            "vLLM, SGLang and TensorRT-LLM do"
        )
    hints = {
        "HTTP 401": ": is the key in OPENAI_API_KEY right?",
        "HTTP 404": f": does the address end with /v1, and does the server call the verifier {endpoint.model}, or is "
        "synthesize.model to be set?",
    }
    return f"{endpoint.url} refuses our requests ({trouble.reason}, {trouble.detail}){hints.get(trouble.reason, '')}"
