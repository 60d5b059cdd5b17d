"""`forebay pause`, `resume` and `drain`: the living system changed by hand."""

import json
import re
import time
from datetime import UTC, datetime

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from forebay_cli import console
from forebay_cli.connection import connected, settings
from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, ModelNotFound, QueueUnavailable, RequestError

PAUSE_S = 100 * 365 * 86_400
"""A pause without an end: JetStream wants one."""

MAX_PAUSE_S = 365 * 86_400
"""The longest pause with one."""

DRAIN_TIMEOUT_S = 5.0

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class WorkerNotFound(RequestError):
    """Nobody answers under this worker's id."""


def duration_s(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1d` or `1h30m`.

    Raises:
        ConfigurationError: it is none of these.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigurationError(f"{text!r} is no duration: write 90s, 10m, 2h or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


async def pause(model: str, for_s: float | None, *, as_json: bool) -> None:
    """Have no worker get a request of `model` for `for_s` seconds, or until it is resumed; what runs goes on.

    Raises:
        ConfigurationError: `for_s` is 0, or more than MAX_PAUSE_S.
        ModelNotFound: there is no such model.
    """
    if for_s is not None and not 0 < for_s <= MAX_PAUSE_S:
        raise ConfigurationError("--for must be above 0s and at most 365d; without it, `forebay resume` ends a pause")
    async with connected(settings()) as link:
        consumer = await _consumer(link, model)
        until = datetime.fromtimestamp(time.time() + (PAUSE_S if for_s is None else for_s), UTC)
        try:
            await link.jetstream.pause_consumer(names.STREAM, consumer.name, until.isoformat().replace("+00:00", "Z"))
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("NATS did not answer") from exc
    running = consumer.num_ack_pending or 0
    if as_json:
        console.print_json({"model": _model(consumer), "paused_until": until.timestamp(), "running": running})
        return
    end = f"until {until.astimezone():%F %T}" if for_s else "until it is resumed"
    console.stdout.print(f"paused {_model(consumer)} {end}; {running} still run", markup=False)


async def resume(model: str, *, as_json: bool) -> None:
    """End a pause of `model`.

    Raises:
        ModelNotFound: there is no such model.
    """
    async with connected(settings()) as link:
        consumer = await _consumer(link, model)
        try:
            await link.jetstream.resume_consumer(names.STREAM, consumer.name)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("NATS did not answer") from exc
    waiting = consumer.num_pending or 0
    if as_json:
        console.print_json({"model": _model(consumer), "was_paused": bool(consumer.paused), "waiting": waiting})
        return
    was = "resumed" if consumer.paused else "was not paused:"
    console.stdout.print(f"{was} {_model(consumer)}; {waiting} wait", markup=False)


async def drain(worker: str, *, as_json: bool) -> None:
    """Tell one worker to take nothing more, finish what it runs within DRAIN_TIMEOUT, and end.

    Raises:
        WorkerNotFound: there is no such worker.
    """
    async with connected(settings()) as link:
        # An id goes into a subject: what cannot be one goes no further.
        if not names.is_request_id(worker):
            raise WorkerNotFound(f"there is no worker {worker}: `forebay status` lists them")
        try:
            answer = await link.client.request(names.drain_subject(worker), b"", timeout=DRAIN_TIMEOUT_S)
        except NoRespondersError as exc:
            raise WorkerNotFound(f"there is no worker {worker}: `forebay status` lists them") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the worker did not answer") from exc
    running = json.loads(answer.data).get("running", 0)
    if as_json:
        console.print_json({"worker": worker, "running": running})
        return
    console.stdout.print(f"{worker} drains: it takes nothing more, finishes {running} and ends", markup=False)


async def _consumer(link: Connection, model: str) -> ConsumerInfo:
    try:
        found = await topology.consumers(link)
    except NotFoundError:
        found = []
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc
    for consumer in found:
        metadata = consumer.config.metadata or {}
        aliases = metadata.get(names.ALIASES_METADATA, "").split(",")
        if model in (consumer.name, _model(consumer), *aliases):
            return consumer
    known = ", ".join(_model(consumer) for consumer in found) or "none"
    raise ModelNotFound(f"there is no model {model}; known are: {known}")


def _model(consumer: ConsumerInfo) -> str:
    return str((consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name))
