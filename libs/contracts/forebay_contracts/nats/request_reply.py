"""Requests over NATS and publishes into its streams, for the hot paths.

They do what `Client.request` and `JetStreamContext.publish` do, with two thirds of the CPU: they make no random name
and no waiter for each call. A worker makes five such calls for one request.
"""

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.errors import APIError

_NO_RESPONDERS = "503"


class Requests:
    """One inbox for all answers of a connection. The last token of an answer's subject names its request."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._inbox = ""
        self._starting = asyncio.Lock()
        self._tokens = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Msg]] = {}

    async def request(
        self, subject: str, payload: bytes = b"", *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """Publish, and return the answer.

        Raises:
            NoRespondersError: nobody subscribes to `subject`.
            TimeoutError: no answer within `timeout_s`.
            nats.errors.Error: the message cannot be sent now.
        """
        if not self._inbox:
            await self._start()
        loop = asyncio.get_running_loop()
        token = str(next(self._tokens))
        answer: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = answer
        timer = loop.call_later(timeout_s, _expire, (answer,))
        try:
            await self._client.publish(subject, payload, reply=self._inbox + token, headers=headers)
            return _answered(await answer)
        finally:
            timer.cancel()
            del self._waiting[token]

    async def store(
        self, subject: str, payload: bytes = b"", *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> int:
        """Publish into the stream that `subject` belongs to; returns the sequence once it is stored.

        Raises:
            APIError: the stream refused the message.
            NoRespondersError, TimeoutError, nats.errors.Error: as `request`.
        """
        return int(_stored(await self.request(subject, payload, timeout_s=timeout_s, headers=headers))["seq"])

    async def store_all(self, messages: Mapping[str, dict[str, str]], *, timeout_s: float) -> list[bool]:
        """Publish headers without a payload, by subject, at once, and wait until all are stored. Raises as `store`.

        Returns whether each is new, and no repetition.
        """
        if not self._inbox:
            await self._start()
        loop = asyncio.get_running_loop()
        answers = {str(next(self._tokens)): loop.create_future() for _ in messages}
        self._waiting |= answers
        timer = loop.call_later(timeout_s, _expire, answers.values())
        try:
            for token, (subject, headers) in zip(answers, messages.items(), strict=True):
                await self._client.publish(subject, b"", reply=self._inbox + token, headers=headers)
            return ["duplicate" not in _stored(_answered(await answer)) for answer in answers.values()]
        finally:
            timer.cancel()
            for token in answers:
                del self._waiting[token]

    async def _start(self) -> None:
        async with self._starting:
            if not self._inbox:
                inbox = self._client.new_inbox() + "."
                await self._client.subscribe(inbox + "*", cb=self._arrived)
                self._inbox = inbox

    async def _arrived(self, msg: Msg) -> None:
        answer = self._waiting.get(msg.subject.rsplit(".", 1)[1])
        if answer is not None and not answer.done():
            answer.set_result(msg)


def _answered(msg: Msg) -> Msg:
    if not msg.data and msg.headers and msg.headers.get("Status") == _NO_RESPONDERS:
        raise NoRespondersError
    return msg


def _stored(msg: Msg) -> dict[str, Any]:
    answer: dict[str, Any] = orjson.loads(msg.data)
    if "error" in answer:
        raise APIError.from_error(answer["error"])
    return answer


def _expire(answers: "Iterable[asyncio.Future[Msg]]") -> None:
    """Whoever waits, waits for the first answer that is missing."""
    error: Exception | None = TimeoutError()
    for answer in answers:
        if answer.done():
            continue
        if error is not None:
            answer.set_exception(error)
            error = None
        else:
            answer.cancel()
