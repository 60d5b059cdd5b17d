"""A bound for each key, so that one client cannot take the whole queue."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from forebay_api import request_metrics
from forebay_api.clients import limit_headers
from forebay_api.clients.keys import ApiKeys, Client
from forebay_api.clients.token_limits import TokenLimits
from forebay_api.watching.drain_rate import MAX_RETRY_AFTER_S
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire.errors import KeyLimitReached
from forebay_contracts.wire.heartbeats import ApiInfo
from forebay_contracts.wire.request import InferenceRequest, Tier

NEWEST: Final = 0.2
"""How much the newest request of a key counts in the mean time that its requests take."""


class KeyLimits:
    """How many requests each key has admitted and unfinished, waiting and processing together.

    Requests of this api are counted exactly. Those of other apis are known from their heartbeats, at most a second old.
    So the bound costs a request no round trip, and the count of an api that dies goes with it. Between two heartbeats a
    key can exceed the bound by as many again for each further api that it asks.

    Requests of the tier flex are not counted: the waiting room has a bound of its own. With `defers` (KEY_OVERFLOW), a
    request beyond the bound waits there too. Limits on tokens hold for every request, and
    again when it leaves the room.
    """

    def __init__(
        self,
        keys: ApiKeys,
        others: Callable[[], Iterable[ApiInfo]],
        tokens: TokenLimits,
        *,
        defers: bool = False,
    ) -> None:
        self._keys = keys
        self._others = others
        self._tokens = tokens
        self._defers = defers
        self._took_s: dict[str, float] = {}
        """The mean time of a request by name, from its admission to its end."""
        self.unfinished: dict[str, int] = {}
        """The count of this api by name."""

    @contextlib.contextmanager
    def one_more(self, request: InferenceRequest) -> Iterator[InferenceRequest]:
        """A request from its admission to its end; yields it as it is to be admitted.

        Raises:
            KeyLimitReached: its key has as many as it may have, or has used its tokens.
        """
        name = request.key
        try:
            self.check_tokens(name)
        except KeyLimitReached:
            bound(request_metrics.KEY_REQUESTS, name or "", "refused").inc()
            raise
        client = self._keys.of(name) if name is not None else None
        if name is None or request.deferred:
            yield request
            return
        if client is not None and client.max_requests is not None and self._unfinished(name) >= client.max_requests:
            if not self._defers:
                raise self._refusal(name, client.max_requests)
            yield request.model_copy(update={"tier": Tier.OVERFLOW})
            return
        self.unfinished[name] = self.unfinished.get(name, 0) + 1
        began = time.monotonic()
        try:
            yield request
        finally:
            took_s = time.monotonic() - began
            mean_s = self._took_s.get(name, took_s)
            self._took_s[name] = mean_s + NEWEST * (took_s - mean_s)
            self.unfinished[name] -= 1
            if not self.unfinished[name]:
                del self.unfinished[name]

    def has_tokens(self, name: str | None) -> bool:
        """Whether the key of this name has tokens left."""
        try:
            self.check_tokens(name)
        except KeyLimitReached:
            return False
        return True

    def headers(self, client: Client) -> list[tuple[bytes, bytes]]:
        """What an answer tells the client of its limits."""
        found: list[tuple[bytes, bytes]] = []
        if client.max_requests is not None and client.name is not None:
            unfinished = self._unfinished(client.name)
            # All that are in the queue now have ended after about the time that one takes.
            reset_s = self._took_s.get(client.name) if unfinished else 0.0
            left = max(client.max_requests - unfinished, 0)
            found += limit_headers.headers("requests", client.max_requests, left, reset_s)
        if (tokens := self._tokens.left(client)) is not None:
            found += limit_headers.headers("tokens", *tokens)
        return found

    def _unfinished(self, name: str) -> int:
        return self.unfinished.get(name, 0) + sum(api.unfinished.get(name, 0) for api in self._others())

    def check_tokens(self, name: str | None) -> None:
        """Raises KeyLimitReached if the key of this name has used its tokens."""
        if name is not None and (client := self._keys.of(name)) is not None:
            self._tokens.check(client)

    def _refusal(self, name: str, most: int) -> KeyLimitReached:
        bound(request_metrics.KEY_REQUESTS, name, "refused").inc()
        seconds = math.ceil(self._took_s.get(name, 0.0) / most)
        return KeyLimitReached(
            f"Your key `{name}` has {most} requests in the queue, as many as it may have: "
            "try again when one of them has ended.",
            min(max(seconds, 1), MAX_RETRY_AFTER_S),
        )
