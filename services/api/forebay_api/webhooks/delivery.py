"""Delivers the events of the work queue to the receivers that the operator has named.

An event is pulled by any api. First it becomes a message for each receiver that wants it. Each of these is posted until
the receiver takes it, with growing pauses. The queue keeps the pauses, and an api nothing of an event. A receiver that
is slow or down holds up no other one: at most POSTS_AT_ONCE of its events are posted at once, and the others go back
into the queue until it is their turn.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Final

import httpx
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_api import request_metrics
from forebay_api.webhooks.endpoints import Endpoint, Endpoints
from forebay_contracts.nats import clock
from forebay_contracts.nats.streams import EVENT_TTL_S
from forebay_contracts.queueing.protocols import Deliveries, Delivery
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.event import Event

POSTS_AT_ONCE: Final = 8
"""Most posts to one receiver that one api process makes at once."""

FIRST_PAUSE_S: Final = 1.0
"""About how long after its end an event is tried again that was not taken. Then its age doubles with each try."""

UNWANTED_S: Final = 600.0
"""How long an event waits that no receiver known here wants: a new file may not have reached this api yet."""

GONE: Final = 410

log = logging.getLogger(__name__)


class _Line:
    """Those who wait for one receiver. `took_s` is how long its posts take, `booked` when the last one's turn is."""

    def __init__(self) -> None:
        self.busy = 0
        self.took_s = 0.1
        self.booked = 0.0

    def turn_s(self) -> float:
        """The time until it is the turn of one more."""
        now = time.monotonic()
        self.booked = max(self.booked, now) + self.took_s / POSTS_AT_ONCE
        return self.booked - now

    @contextlib.contextmanager
    def post(self) -> Iterator[None]:
        """One post."""
        began = time.monotonic()
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.took_s += (time.monotonic() - began - self.took_s) / POSTS_AT_ONCE


class Deliverer:
    """Pulls events, and posts them. `publish` puts an event into the queue. `longest_pause_s` is between two tries.

    Raises:
        ConfigurationError: HTTPS_PROXY, SSL_CERT_FILE or the like are wrong.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        deliveries: Deliveries,
        publish: Callable[[Event], Awaitable[None]],
        timeout_s: float,
        longest_pause_s: float,
    ) -> None:
        self._endpoints = endpoints
        self._deliveries = deliveries
        self._publish = publish
        self._timeout_s = timeout_s
        self._longest_pause_s = longest_pause_s
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        self._tasks: set[asyncio.Task[None]] = set()
        self._client = _client(timeout_s)

    async def run(self) -> None:
        """Deliver until it is cancelled. Another api then makes the posts that were under way."""
        async with self._client:
            try:
                while True:
                    task = asyncio.create_task(self._settle(await self._deliveries.pull()))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            finally:
                await self._deliveries.stop()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _settle(self, delivery: Delivery) -> None:
        try:
            event = Event.model_validate_json(delivery.data)
        except ValidationError:
            log.warning(
                "[Webhooks] message %d is of another version, and waits for an api that can read it", delivery.sequence
            )
            await self._settled(delivery.nak(self._longest_pause_s))
            return
        if event.endpoint is None:
            await self._settled(self._spread(event, delivery))
        elif (endpoint := self._endpoints.named.get(event.endpoint)) is None or not endpoint.wants(event):
            await self._settled(self._unwanted(event, delivery))
        elif (line := self._lines[event.endpoint]).busy >= POSTS_AT_ONCE:
            await self._settled(delivery.nak(min(line.turn_s(), self._longest_pause_s)))
        else:
            try:
                with line.post():
                    status, reason = await self._post(endpoint, event)
            except asyncio.CancelledError:
                await self._settled(delivery.nak())
                raise
            await self._settled(self._posted(event, delivery, status, reason))

    async def _settled(self, work: Awaitable[None]) -> None:
        """An event that cannot be settled now is delivered again."""
        try:
            await work
        except (QueueUnavailable, NatsError, TimeoutError) as exc:
            log.debug("[Webhooks] an event is not settled: %r", exc)

    async def _spread(self, event: Event, delivery: Delivery) -> None:
        """A message for each receiver."""
        found = self._endpoints.of(event)
        if not found:
            return await self._unwanted(event, delivery)
        for name in found:
            await self._publish(event.model_copy(update={"endpoint": name}))
        return await delivery.ack()

    async def _unwanted(self, event: Event, delivery: Delivery) -> None:
        if (age_s := clock.now() - event.created_at) > UNWANTED_S:
            log.warning("[Webhooks] %s %s: nobody is to be told any more", event.id, event.type)
            return await delivery.ack()
        return await delivery.nak(self._pause_s(age_s))

    async def _post(self, endpoint: Endpoint, event: Event) -> tuple[int, str]:
        """The status of the answer, 0 if there is none, and a word on it. The body of the answer is not read."""
        body = event.body()
        headers = endpoint.headers(event.id, int(clock.now()), body)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", endpoint.url, content=body, headers=headers) as response,
            ):
                return response.status_code, f"it answered {response.status_code}"
        except TimeoutError:
            return 0, f"no answer within {self._timeout_s:g} s"
        except httpx.ConnectError as exc:
            return 0, f"no connection: {exc}"  # such as a certificate that is not valid
        except Exception as exc:  # whatever a receiver answers, other events go on
            return 0, type(exc).__name__

    async def _posted(self, event: Event, delivery: Delivery, status: int, reason: str) -> None:
        name = event.endpoint or ""
        if 200 <= status < 300:
            bound(request_metrics.WEBHOOKS, name, "delivered").inc()
            return await delivery.ack()
        bound(request_metrics.WEBHOOKS, name, "failed").inc()
        if status == GONE:
            log.warning("[Webhooks] %s of %s: %s wants no more of it (410)", event.id, event.object_id, name)
            return await delivery.term()
        age_s = clock.now() - event.created_at
        pause_s = self._pause_s(age_s)
        level, then = logging.INFO, f"again in {pause_s:.0f} s"
        if age_s + pause_s > EVENT_TTL_S:
            level, then = logging.ERROR, "it is given up"
        log.log(level, "[Webhooks] %s of %s to %s: %s; %s", event.id, event.object_id, name, reason, then)
        return await delivery.nak(pause_s)

    def _pause_s(self, age_s: float) -> float:
        return min(max(age_s, FIRST_PAUSE_S), self._longest_pause_s) * random.uniform(0.5, 1.5)


def _client(timeout_s: float) -> httpx.AsyncClient:
    # Without a limit: each receiver has one of its own. A redirect could lead anywhere, so none is followed.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    try:
        client = httpx.AsyncClient(timeout=timeout_s, follow_redirects=False, limits=limits)
    except (OSError, ValueError, ImportError, httpx.InvalidURL) as exc:
        raise ConfigurationError(f"webhooks cannot be posted with this environment: {exc}") from exc
    # Receivers on one host must not see or break each other's posts by a cookie.
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
    return client
