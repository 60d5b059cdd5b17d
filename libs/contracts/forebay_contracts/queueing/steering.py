"""What operators do to a model or a worker: pause, resume and drain."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import ConsumerInfo

from forebay_contracts.nats import clock, permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import aliases_of, consumers, model_of
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ModelNotFound, QueueUnavailable, SteeringNotAllowed, WorkerNotFound

UNTIL_RESUMED_S: Final = 100 * 365 * 86_400
"""A pause without an end: JetStream requires one."""

MAX_PAUSE_S: Final = 365 * 86_400
"""The longest pause with an end."""

TIMEOUT_S: Final = 5.0
"""How long NATS, or a worker that is to drain, may take."""


@dataclass(frozen=True, slots=True)
class Steered:
    """A model before it was paused or resumed: its requests, and whether it was paused.

    `paused_until`: seconds since the epoch, None after a resume.
    """

    model: str
    paused_until: float | None
    was_paused: bool
    waiting: int
    running: int


async def pause(connection: Connection, model: str, for_s: float | None = None) -> Steered:
    """Stop handing out requests of a model, for `for_s` seconds or until it is resumed. Running ones go on.

    `model` is its name, an alias, or its consumer.

    Raises:
        ModelNotFound: no such model has a consumer.
        SteeringNotAllowed: the user of this connection may not do it.
        QueueUnavailable: NATS does not answer.
    """
    consumer = await _consumer(connection, model)
    until = clock.now() + (for_s or UNTIL_RESUMED_S)
    text = datetime.fromtimestamp(until, UTC).isoformat().replace("+00:00", "Z")
    await _set(connection, consumer, {"pause_until": text})
    return _steered(consumer, until)


async def resume(connection: Connection, model: str) -> Steered:
    """Hand out requests of a paused model again. Raises as `pause`."""
    consumer = await _consumer(connection, model)
    await _set(connection, consumer, {})
    return _steered(consumer, None)


async def drain(connection: Connection, worker: str) -> int:
    """Let a worker finish its requests and exit, as SIGTERM does; returns how many it runs.

    Raises:
        WorkerNotFound: no worker answers to this id.
        SteeringNotAllowed, QueueUnavailable: as `pause`.
    """
    # The id becomes part of a subject.
    if names.is_request_id(worker):
        subject = names.drain_subject(worker)
        await _need(connection, subject)
        try:
            answer = await connection.client.request(subject, b"", timeout=TIMEOUT_S)
        except NoRespondersError:
            pass
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable(f"the worker {worker} did not answer") from exc
        else:
            return int(json.loads(answer.data).get("running", 0))
    raise WorkerNotFound(f"there is no worker {worker}", param="worker")


def _steered(consumer: ConsumerInfo, until: float | None) -> Steered:
    counts = (consumer.num_pending or 0, consumer.num_ack_pending or 0)
    return Steered(model_of(consumer), until, bool(consumer.paused), *counts)


async def _consumer(connection: Connection, model: str) -> ConsumerInfo:
    found = await consumers(connection)
    # As for requests, a name goes before an alias.
    for consumer in sorted(found, key=lambda one: model not in (one.name, model_of(one))):
        if model in (consumer.name, model_of(consumer), *aliases_of(consumer)):
            return consumer
    known = ", ".join(map(model_of, found)) or "none"
    raise ModelNotFound(f"there is no model {model}; known are: {known}", param="model")


async def _set(connection: Connection, consumer: ConsumerInfo, order: dict[str, str]) -> None:
    subject = f"$JS.API.CONSUMER.PAUSE.{names.STREAM}.{consumer.name}"
    await _need(connection, subject)
    try:
        answer = await connection.client.request(subject, json.dumps(order).encode(), timeout=TIMEOUT_S)
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc
    if (error := json.loads(answer.data).get("error")) is not None:
        raise QueueUnavailable(f"NATS refused it: {error.get('description')}")


async def _need(connection: Connection, subject: str) -> None:
    """A request that is denied gets no answer, so the permission is looked at first."""
    own = await permissions.own(connection)
    if own is not None and not own.publish.permit(subject):
        raise SteeringNotAllowed(f"the NATS user `{own.user}` may not publish to {subject}")
