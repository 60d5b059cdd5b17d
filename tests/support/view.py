"""The queue as a user's `nats` command line sees it: requests to the JetStream API, answers as plain JSON."""

import asyncio
import json
from typing import Any

from support.stack import Stack


async def jetstream(stack: Stack, request: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer to `$JS.API.<request>`; an error is an answer too."""
    payload = json.dumps(body).encode() if body is not None else b""
    msg = await stack.connection.client.request(f"$JS.API.{request}", payload, timeout=5)
    answer: dict[str, Any] = json.loads(msg.data)
    return answer


async def stream_state(stack: Stack, stream: str = "INFERENCE") -> dict[str, Any]:
    """`state` of `nats stream info`."""
    state: dict[str, Any] = (await jetstream(stack, f"STREAM.INFO.{stream}"))["state"]
    return state


async def keys(stack: Stack, bucket: str) -> list[str]:
    """The keys of a bucket. `KeyValue.keys` of the client finds none if they come before it has asked how many there
    are."""
    prefix = f"$KV.{bucket}."
    state = (await jetstream(stack, f"STREAM.INFO.KV_{bucket}", {"subjects_filter": f"{prefix}>"}))["state"]
    return [subject.removeprefix(prefix) for subject in state.get("subjects", ())]


async def holds(stack: Stack, count: int, timeout_s: float = 30) -> None:
    """Wait until the queue holds `count` requests, waiting and processing together."""
    async with asyncio.timeout(timeout_s):
        while True:
            if (await stream_state(stack))["messages"] == count:
                return
            await asyncio.sleep(0.01)


async def consumer_reaches(stack: Stack, consumer: str, timeout_s: float = 30, **numbers: int) -> dict[str, Any]:
    """`nats consumer info`, once it has these numbers: the server counts a stored message a moment after its PubAck."""
    async with asyncio.timeout(timeout_s):
        while True:
            info = await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{consumer}")
            if numbers.items() <= info.items():
                return info
            await asyncio.sleep(0.01)


async def idle(stack: Stack, api: int = 0) -> dict[str, Any]:
    """Wait until the last request has been acknowledged, which comes after it was counted; the queue's status then.

    An answer reaches its client a moment before that.
    """
    await holds(stack, 0)
    return await stack.status(api)
