"""The limits that services share: they live on NATS, and each service may have been told some by its environment.

A limit that the environment of a service sets is applied when the service starts. A default is not: what is live stays.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import ServiceInfo

CHECK_INTERVAL_S = 30.0
"""How often a service compares what it was told with what is live."""

MOST_NAMED = 3
"""Services that a sentence names."""

Values = Mapping[str, float]
"""Limits by the names of their settings, in the units of these."""

S = TypeVar("S", bound=Settings)

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where a limit lives: a field of a stream, or with the stream None of the consumer of a model."""

    stream: str | None
    field: str
    unit: int = 1


LIMITS: Final[Mapping[str, _Place]] = {
    "max_queue_size": _Place(names.STREAM, "max_msgs"),
    "key_max_deferred": _Place(names.DEFERRED, "max_msgs_per_subject"),
    "request_state_ttl": _Place(names.bucket_stream(names.REQUESTS_BUCKET), "max_age"),
    "response_ttl": _Place(names.ANSWERS, "max_age"),
    "answer_log_bytes": _Place(names.ANSWERS, "max_bytes"),
    "file_ttl": _Place(names.bucket_stream(names.BATCHES_BUCKET), "max_age"),
    "file_store_bytes": _Place(names.object_stream(names.FILES_BUCKET), "max_bytes"),
    "usage_days": _Place(names.USAGE, "max_age", 86_400),
    "nats_replicas": _Place(names.STREAM, "num_replicas"),
    "max_concurrent_requests": _Place(None, "max_ack_pending"),
    "ack_wait": _Place(None, "ack_wait"),
}

OF_MODEL: Final = frozenset(name for name, place in LIMITS.items() if place.stream is None)
"""The limits of each model."""


def read(streams: Mapping[str, Any], consumer: Any = None) -> dict[str, float]:
    """The limits in the configurations of `streams`, by their names, and of the consumer of a model."""
    found = {}
    for name, (stream, attribute, unit) in LIMITS.items():
        value = getattr(consumer if stream is None else streams.get(stream), attribute, None)
        if value:
            found[name] = value // unit if unit > 1 else value
    return found


def adopted(settings: S, live: Values) -> S:
    """`settings`, with what is `live` in place of each limit that its environment does not set."""
    return settings.model_copy(update={name: live[name] for name in live.keys() - settings.model_fields_set})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that the environment of a process sets (`told`), those that it leaves at their `default`, and those
    that are `live`."""

    told: Values = field(default_factory=dict)
    default: Values = field(default_factory=dict)
    live: Values = field(default_factory=dict)

    def differences(self) -> list[str]:
        """A sentence for each limit that is not live as this process has it."""
        return [
            f"{name.upper()}={value:.15g} is set here, and NATS has {self.live[name]:.15g}: another process was told so"
            for name, value in self.told.items()
            if value != self.live.get(name, value)
        ] + self.default_differences()

    def default_differences(self) -> list[str]:
        """The same for the limits that are not set here."""
        return [
            f"{name.upper()} is {self.live[name]:.15g} on NATS and stays so: it is not set here (default {value:.15g})"
            for name, value in self.default.items()
            if value != self.live.get(name, value)
        ]


class Watch:
    """Compares what this process was told with what is live, and logs each difference once."""

    def __init__(self, read_limits: Callable[[], Awaitable[Limits]]) -> None:
        self._read = read_limits
        self._said: list[str] = []
        self.limits = Limits()

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Look now, and every CHECK_INTERVAL_S while the block lasts."""
        await self.look()
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()

    async def look(self) -> None:
        """Look once. While NATS does not answer, what was seen last stays."""
        with contextlib.suppress(QueueUnavailable):
            self.limits = await self._read()
        differences = self.limits.differences()
        for one in differences:
            if one not in self._said:
                log.warning("[RequestQueue] limits: %s", one)
        self._said = differences

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self.look()


def differences(live: Values, of_models: Mapping[str, Values], services: Iterable[ServiceInfo]) -> list[str]:
    """A sentence for each limit that living services were told otherwise than each other, or than what is live.

    `of_models` has the live limits of each model.
    """
    having = [service for service in services if service.limits is not None]
    pairs = [(name, "", value) for name, value in live.items() if name not in OF_MODEL]
    pairs += [(name, model, value) for model, found in of_models.items() for name, value in found.items()]
    sentences = []
    for name, model, value in pairs:
        concerned = [service for service in having if not model or service.model == model]
        told, silent = _told(name, concerned)
        default = Settings.model_fields[name].default
        # A default of bytes may be more than the account may store.
        differs = bool(silent) and value != default and not name.endswith("_bytes")
        if not differs and told.keys() <= {value}:
            continue
        parts = [f"{_of(model, name)} is {value:.15g} on NATS"]
        parts += [f"{other:.15g} is set for {_named(ids)}" for other, ids in sorted(told.items())]
        parts += [f"not set for {_named(silent)} (default {default:.15g})"] if differs else []
        sentences.append("; ".join(parts))
    return sentences


def _told(name: str, services: Iterable[ServiceInfo]) -> tuple[dict[float, list[str]], list[str]]:
    """The services that were told each value, and those that were told none."""
    told: dict[float, list[str]] = defaultdict(list)
    silent: list[str] = []
    for service in services:
        value = (service.limits or {}).get(name)
        (silent if value is None else told[value]).append(service.id)
    return told, silent


def _of(model: str, name: str) -> str:
    return f"{name.upper()} of {model}" if model else name.upper()


def _named(ids: list[str]) -> str:
    more = len(ids) - MOST_NAMED
    return ", ".join(ids[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
