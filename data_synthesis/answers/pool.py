"""Who is asked next: endpoints with free places, and the conversations that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque

from .endpoint import Endpoint


class Pool:
    """The endpoints, and who waits for one: conversations that go on come before new ones."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self.endpoints = endpoints
        self.closed = False  # to new conversations
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, preferred: Endpoint | None = None, avoided: Endpoint | None = None) -> Endpoint | None:
        """Wait for a free place at an endpoint; None for a new conversation once closed to those.

        Args:
            preferred: of a conversation that goes on; taken if it has a place.
            avoided: taken only if no other has a place.
        """
        while True:
            if preferred is None and self.closed:
                return None
            best = max(
                self.endpoints,
                key=lambda e: (e.free > 0 and e is not avoided, e is preferred, e.free),
                default=None,
            )
            if best is not None and best.free > 0:
                best.in_flight += 1
                return best
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if preferred:
                self._waiting.appendleft(place)
            else:
                self._waiting.append(place)
            await place

    def give_back(self, endpoint: Endpoint) -> None:
        """Leave a place to the next who waits."""
        endpoint.in_flight -= 1
        self.wake()

    def wake(self, everyone: bool = False) -> None:
        """Let as many look again as there are places."""
        places = sum(max(0, endpoint.free) for endpoint in self.endpoints)
        while self._waiting and (everyone or places > 0):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                places -= 1

    def close(self) -> None:
        """Take no new conversation."""
        self.closed = True
        self.wake(everyone=True)


class Seat:
    """A conversation's place at an endpoint, kept from turn to turn so that the server's cache serves it."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self._pool, self._endpoint, self._seated = pool, endpoint, True
        self._avoided: Endpoint | None = None

    async def endpoint(self) -> Endpoint:
        """Give the endpoint to ask next: the same while it is up."""
        if self._seated and (not self._endpoint.up or self._endpoint.paused):
            self.leave()
        if not self._seated:
            found = await self._pool.take(self._endpoint, self._avoided)
            assert found is not None
            self._endpoint, self._seated = found, True
        return self._endpoint

    def leave(self, failed: bool = False) -> None:
        """Give the place back; where the endpoint has `failed`, another is tried next if there is one."""
        self._avoided = self._endpoint if failed else None
        if self._seated:
            self._seated = False
            self._pool.give_back(self._endpoint)
