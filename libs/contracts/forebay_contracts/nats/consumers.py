"""What the live consumers tell: which models have one, and where a message stands."""

from dataclasses import dataclass
from typing import NamedTuple

from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable


async def consumers(connection: Connection) -> list[ConsumerInfo]:
    """The live consumers, one for each model; none if there is no stream yet.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    try:
        infos: list[ConsumerInfo] = await connection.jetstream.consumers_info(names.STREAM)
    except NotFoundError:
        return []
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("the queue cannot be reached") from exc
    return infos


def model_of(consumer: ConsumerInfo) -> str:
    """The full name of a consumer's model; the consumer's own name if its metadata have none."""
    return str((consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name))


def aliases_of(consumer: ConsumerInfo) -> tuple[str, ...]:
    """The other names of a consumer's model."""
    return _listed(consumer, names.ALIASES_METADATA)


def _listed(consumer: ConsumerInfo, key: str) -> tuple[str, ...]:
    return tuple(filter(None, (consumer.config.metadata or {}).get(key, "").split(",")))


class KnownModel(NamedTuple):
    """The other names of a model, and the names of its LoRA adapters, from its newest worker."""

    aliases: tuple[str, ...]
    adapters: tuple[str, ...] = ()


async def known_models(connection: Connection) -> dict[str, KnownModel]:
    """Each model that has a consumer. Requests can wait for it even if no worker serves it now.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    return {
        model_of(consumer): KnownModel(aliases_of(consumer), _listed(consumer, names.ADAPTERS_METADATA))
        for consumer in await consumers(connection)
        if names.MODEL_METADATA in (consumer.config.metadata or {})
    }


@dataclass(frozen=True, slots=True)
class Place:
    """A message's place among its model's waiting ones: 1 is the next. `moved` counts all deliveries of the model."""

    position: int
    moved: int


async def waiting_place(connection: Connection, model: str, sequence: int) -> Place | None:
    """The place of a waiting message; None if NATS does not answer.

    If several models share the stream, or messages in between were removed, the true place may be smaller.
    """
    try:
        info = await connection.jetstream.consumer_info(names.STREAM, names.model_token(model))
    except (NatsError, TimeoutError):
        return None
    behind = sequence - (info.delivered.stream_seq if info.delivered else 0)
    moved = info.delivered.consumer_seq if info.delivered else 0
    return Place(max(1, min(behind, info.num_pending or 1)), moved)
