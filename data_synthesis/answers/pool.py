"""Which endpoint takes the next request: those with free slots, and the conversations that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque

from .endpoint import Endpoint


class Pool:
    """The endpoints, and who waits for one: conversations that go on come before new ones.

    Args:
        concurrency: conversations at once for each endpoint; some are between two tries, without a slot.
    """

    def __init__(self, concurrency: int) -> None:
        self.endpoints: list[Endpoint] = []
        self.conversations = 0  # that have begun and not ended
        self.closed = False  # to new conversations
        self._concurrency = concurrency
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def max_conversations(self) -> int:
        """Conversations at once."""
        return self._concurrency * len(self.endpoints)

    async def begin(self) -> Slot | None:
        """Wait for a slot for a new conversation; None once closed."""
        endpoint = await self.take()
        if endpoint is None:
            return None
        self.conversations += 1
        return Slot(self, endpoint)

    async def take(self, preferred: Endpoint | None = None, avoided: Endpoint | None = None) -> Endpoint | None:
        """Wait for a free slot of an endpoint; None for a new conversation once closed to those.

        Args:
            preferred: of a conversation that goes on; taken if it has a slot.
            avoided: taken only if no other has a slot.
        """
        while preferred or not self.closed:
            free = [endpoint for endpoint in self.endpoints if endpoint.free > 0]
            if free and (preferred or self.conversations < self.max_conversations):
                best = max(free, key=lambda e: (e is not avoided, e is preferred, e.free))
                best.in_flight += 1
                return best
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if preferred else self._waiting.append)(waiter)
            await waiter
        return None

    def wake(self) -> None:
        """Let as many look again as there are slots, or everyone once closed."""
        slots = len(self._waiting) if self.closed else sum(max(0, endpoint.free) for endpoint in self.endpoints)
        for waiter in [self._waiting.popleft() for _ in range(min(slots, len(self._waiting)))]:
            if not waiter.done():
                waiter.set_result(None)


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
            endpoint = await self._pool.take(self._endpoint, self._avoided)
            assert endpoint is not None
            self._endpoint, self._held = endpoint, True
        return self._endpoint

    def release(self, failed: bool = False) -> None:
        """Give the slot back; if the endpoint has `failed`, another is tried next if there is one."""
        if self._held:
            self._held, self._avoided = False, self._endpoint if failed else None
            self._endpoint.in_flight -= 1
        self._pool.wake()

    def end(self) -> None:
        """Give the slot back: the conversation has ended."""
        self._pool.conversations -= 1
        self.release()
