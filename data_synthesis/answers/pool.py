"""Which endpoint takes the next request: those with free slots, and the conversations that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque

from .endpoint import Endpoint


class Pool:
    """The endpoints, and who waits for one: conversations that go on come before new ones."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []
        self.closed = False  # to new conversations
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, preferred: Endpoint | None = None, avoided: Endpoint | None = None) -> Endpoint | None:
        """Wait for a free slot of an endpoint; None for a new conversation once closed to those.

        Args:
            preferred: of a conversation that goes on; taken if it has a slot.
            avoided: taken only if no other has a slot.
        """
        while preferred is not None or not self.closed:
            free = [endpoint for endpoint in self.endpoints if endpoint.free > 0]
            if free:
                best = max(free, key=lambda e: (e is not avoided, e is preferred, e.free))
                best.in_flight += 1
                return best
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if preferred else self._waiting.append)(waiter)
            await waiter
        return None

    def give_back(self, endpoint: Endpoint) -> None:
        """Leave a slot to the next who waits."""
        endpoint.in_flight -= 1
        self.wake()

    def wake(self, everyone: bool = False) -> None:
        """Let as many look again as there are slots."""
        slots = sum(max(0, endpoint.free) for endpoint in self.endpoints)
        while self._waiting and (everyone or slots > 0):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                slots -= 1

    def close(self) -> None:
        """Take no new conversation."""
        self.closed = True
        self.wake(everyone=True)


class Slot:
    """A conversation's slot of an endpoint, held from turn to turn so that the server's prefix cache serves it."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self._pool, self._endpoint, self._held = pool, endpoint, True
        self._avoided: Endpoint | None = None

    async def endpoint(self) -> Endpoint:
        """Return the endpoint to ask next: the same while it is up."""
        if not self._endpoint.up or self._endpoint.paused:
            self.release()
        if not self._held:
            found = await self._pool.take(self._endpoint, self._avoided)
            assert found is not None
            self._endpoint, self._held = found, True
        return self._endpoint

    def release(self, failed: bool = False) -> None:
        """Give the slot back; if the endpoint has `failed`, another is tried next if there is one."""
        if self._held:
            self._avoided = self._endpoint if failed else None
            self._held = False
            self._pool.give_back(self._endpoint)
