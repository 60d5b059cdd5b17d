"""From an accepted body to its request, the writer of its answer, and the block that yields the answer."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from starlette.datastructures import Headers

from forebay_api.clients.keys import Client
from forebay_api.context import Context
from forebay_api.http.bodies import off_loop
from forebay_api.in_flight.idempotency import HEADER, scoped_key
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.openai.format import Format
from forebay_api.watching.served_models import Asked
from forebay_contracts.wire import names
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Tier


class Accepted(NamedTuple):
    """A valid body, of `size` bytes, and where it comes from. `created_at`: seconds since the epoch.

    For `forwarded` see `InferenceRequest`.
    """

    body: Any
    size: int
    id: str
    client: Client
    headers: Headers
    completion_type: CompletionType
    asked: Asked
    created_at: float
    forwarded: tuple[str, ...] = ()

    @property
    def idempotency_key(self) -> str | None:
        """The key under which this client asked for the request, if it gave one. Raises InvalidRequest."""
        if (key := self.headers.get(HEADER)) is None:
            return None
        return scoped_key(key, self.headers.get("authorization") or self.headers.get("x-api-key", ""))

    async def request(self, *args: Any, reply_to: str, timeout_s: float) -> InferenceRequest:
        """The request that `body.request` makes of `args`, made in a thread if the body is large."""
        tier = self.client.tier(getattr(self.body, "service_tier", None))
        # Pydantic keeps the names of what was given. From 19 on they take 1.5 KB more in each request that waits.
        seldom: dict[str, Any] = {"adapter": self.asked.adapter, "key": self.client.name, "forwarded": self.forwarded}
        if tier is not Tier.DEFAULT:
            seldom["tier"] = tier
        return await off_loop(
            self.size,
            self.body.request,
            *args,
            id=self.id,
            completion_type=self.completion_type,
            model=self.asked.model,
            created_at=self.created_at,
            deadline=self.created_at + timeout_s,
            reply_to=reply_to,
            **{name: value for name, value in seldom.items() if value},
        )


class Prepared(NamedTuple):
    """A request, and the block in which it is answered. `format` makes the writer of the answer to a request.

    A stream begins when a worker has begun, or `begins_after_s` after the request was queued, if that is earlier.
    `at_once` makes what a client gets that does not wait for the answer to a request.
    """

    request: InferenceRequest
    format: Callable[[InferenceRequest], Format]
    answered: AbstractAsyncContextManager[LiveAnswer]
    begins_after_s: float | None = None
    at_once: Callable[[InferenceRequest], bytes] | None = None


Prepare = Callable[[Context, Accepted], Awaitable[Prepared]]


def live(kind: Callable[[InferenceRequest, Any], Format]) -> Prepare:
    """Answered in the form `kind`: to this api, or into the log if the client sent an Idempotency-Key."""

    async def prepare(context: Context, accepted: Accepted) -> Prepared:
        body, key = accepted.body, accepted.idempotency_key
        reply_to = names.reply_subject(context.dispatcher.instance, accepted.id)
        if key is not None:
            reply_to = names.answer_subject(accepted.id)
        request = await accepted.request(reply_to=reply_to, timeout_s=context.settings.request_timeout)
        if key is not None:
            answered = context.idempotent.attach(request, key, context.stored.submit)
        else:
            answered = context.dispatcher.submit(request)
        return Prepared(request, lambda answered: kind(answered, body), answered)

    return prepare
