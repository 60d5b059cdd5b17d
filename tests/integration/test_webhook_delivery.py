"""Webhooks on real processes: receivers that are down, slow or broken, and services that die."""

import asyncio
import json
from pathlib import Path

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.receiver import receivers, written
from support.stack import MODEL, running


async def test_each_event_arrives_whatever_its_receiver_does(nats_server: NatsServer, tmp_path: Path) -> None:
    async with receivers("good", "down", "slow", "broken", "moved", down=("down",)) as made:
        good, slow, broken, moved = made["good"], made["slow"], made["broken"], made["moved"]

        async def late() -> int:
            await asyncio.sleep(2)
            return 503

        async def fault() -> int:
            return 500

        async def redirect() -> int:
            return 307

        slow.answer, broken.answer, moved.answer = late, fault, redirect
        file = tmp_path / "webhooks.toml"
        file.write_text(written(made))
        settings = {"webhooks_file": file, "webhook_timeout": 0.5, "webhook_retry_max": 0.5, "max_deliveries": 1}
        async with running(nats_server, max_concurrent_requests=4, **settings) as stack:
            client = stack.openai()

            async def begun(orders: str, **fields: object) -> str:
                fields = {"background": True, **fields}
                return (await client.responses.create(model=MODEL, input=f"[[{orders}]]", **fields)).id  # type: ignore[call-overload,no-any-return]

            await begun("tokens=1", background=False)
            cancelled = await begun("tokens=9000 delay_ms=20")
            expected = {
                "response.completed": await begun("tokens=2"),
                "response.incomplete": await begun("tokens=9", max_output_tokens=3),
                "response.failed": await begun("tokens=2 fail"),
                "response.cancelled": cancelled,
            }
            await client.responses.cancel(cancelled)
            events = await good.receives(4)
            assert {event.type: event.data.id for event in events} == expected
            assert not [one.taken for name, one in made.items() if name != "good" and one.taken]
            # The api that posts them stops, and receivers come back.
            await stack.apis[0].stop()
            for one in (slow, broken, moved):
                one.answer = one.take
            await made["down"].start()
            await stack.api()
            for receiver in made.values():
                taken = await receiver.receives(4, timeout_s=75)
                assert {event.type: event.data.id for event in taken} == expected
                assert {event.id for event in taken} == {event.id for event in events}
            info = stack.connection.jetstream.stream_info
            async with asyncio.timeout(30):
                while (await info("INFERENCE_WEBHOOKS")).state.messages:  # noqa: ASYNC110 - an ack leaves no event
                    await asyncio.sleep(0.05)


async def test_the_ends_of_batches_are_told(nats_server: NatsServer, tmp_path: Path) -> None:
    async with receivers("good") as made:
        file = tmp_path / "webhooks.toml"
        file.write_text(written(made))
        async with running(nats_server, max_concurrent_requests=4, webhooks_file=file) as stack:
            client = stack.openai()
            body = {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=1]]"}]}
            line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
            ids = []
            for data in (json.dumps(line).encode(), b"no line of a batch"):
                sent = await client.files.create(file=("in.jsonl", data), purpose="batch")
                batch = await client.batches.create(
                    input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
                ids.append(batch.id)
            events = await made["good"].receives(2)
            expected = {"batch.completed": ids[0], "batch.failed": ids[1]}
            assert {event.type: event.data.id for event in events} == expected
            assert (await client.batches.retrieve(ids[0])).status == "completed"


async def test_what_no_worker_takes_is_told_although_its_api_is_gone(nats_server: NatsServer, tmp_path: Path) -> None:
    async with receivers("good") as made:
        file = tmp_path / "webhooks.toml"
        file.write_text(written(made))
        settings = {"webhooks_file": file, "background_timeout": 1}
        async with running(nats_server, apis=2, workers=0, **settings) as stack:
            client = stack.openai()
            fields = {"model": MODEL, "input": "[[tokens=1]]", "background": True}
            waiting = [await client.responses.create(**fields, service_tier=tier) for tier in ("flex", "default")]
            await stack.apis[0].stop()
            events = await made["good"].receives(2, timeout_s=60)
            assert {(event.type, event.data.id) for event in events} == {("response.failed", one.id) for one in waiting}
            totals = await stack.states.totals()
            assert totals[RequestStatus.TIMED_OUT] == 2
