"""Events for webhooks, published into the work queue `INFERENCE_WEBHOOKS`. The apis deliver them."""

from typing import Final

from nats.errors import Error as NatsError

from forebay_contracts.nats.request_reply import Requests
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.event import Event

PUBLISH_TIMEOUT_S: Final = 5.0
"""How long a publish may take."""


async def publish_event(requests: Requests, event: Event) -> None:
    """Publish `event`. A repetition within DUPLICATE_WINDOW_S is not stored again. Raises QueueUnavailable."""
    name = event.id if event.endpoint is None else f"{event.id}.{event.endpoint}"
    try:
        await requests.store(
            names.WEBHOOK_SUBJECT, event.encode(), timeout_s=PUBLISH_TIMEOUT_S, headers={names.HEADER_MSG_ID: name}
        )
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("the event was not stored") from exc
