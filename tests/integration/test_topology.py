import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forebay_contracts.nats import streams, topology
from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.nats.consumers import consumers
from forebay_contracts.nats.storage import bounded
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from support.nats import NatsServer, flushed

MODEL = "org/model"
TOKEN = "org-model"


def settings(server: NatsServer, **values: Any) -> Settings:
    return load(Settings, nats_url=server.url, **values)


@contextlib.asynccontextmanager
async def connected(server: NatsServer) -> AsyncIterator[Connection]:
    connection = await connect(settings(server), "test")
    try:
        yield connection
    finally:
        await connection.close()


async def api_request(connection: Connection, subject: str) -> dict[str, Any]:
    """What the `nats` CLI asks, as it asks it."""
    answer = await connection.client.request(f"$JS.API.{subject}", b"", timeout=5)
    found: dict[str, Any] = json.loads(answer.data)
    return found


async def publish(connection: Connection, count: int) -> None:
    queue = JetStreamAdmission(connection)
    for number in range(count):
        await queue.publish(
            InferenceRequest(
                id=f"r{number}",
                completion_type=CompletionType.CHAT,
                model=MODEL,
                created_at=0,
                deadline=4_000_000_000,
                reply_to="x",
            )
        )


async def test_the_limits_are_read_back_from_the_server(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server, max_queue_size=7, max_concurrent_requests=3), MODEL)
        stream = (await api_request(connection, "STREAM.INFO.INFERENCE"))["config"]
        consumer = (await api_request(connection, f"CONSUMER.INFO.INFERENCE.{TOKEN}"))["config"]
    assert stream["max_msgs"] == 7
    assert (stream["retention"], stream["discard"], stream["storage"]) == ("workqueue", "new", "file")
    assert stream["subjects"] == ["inference.requests.>"]
    assert stream["allow_msg_ttl"] is True
    assert consumer["max_ack_pending"] == 3
    assert (consumer["durable_name"], consumer["ack_policy"]) == (TOKEN, "explicit")
    assert consumer["filter_subject"] == "inference.requests.org-model.*"
    assert consumer.get("max_deliver", -1) == -1
    assert consumer["metadata"]["forebay.model"] == MODEL


def test_the_parts_of_an_account_leave_room_for_states() -> None:
    configs = streams.stream_configs(Settings(_env_file=None), storage=1e6)
    assert sum(config.max_bytes or 0 for config in configs) < 0.9e6


async def test_the_second_time_there_is_nothing_to_change(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        made = await topology.ensure(connection, settings(nats_server), MODEL)
        assert len(made) == len(streams.stream_configs(settings(nats_server))) + 3  # and three consumers
        assert await topology.ensure(connection, settings(nats_server), MODEL) == []
    nats_server.restart()
    async with connected(nats_server) as connection:
        again = await topology.ensure(connection, settings(nats_server), MODEL)
    assert again == []


def limited(folder: Path, store: str, account: str) -> NatsServer:
    """A server that stores at most `store`, with one user, who may do everything in an account of at most `account`."""
    conf = folder / "nats.conf"
    conf.write_text(
        f'jetstream {{ store_dir: "{folder}/store", max_file_store: {store} }}\n'
        f"accounts {{ A {{ jetstream {{ max_file: {account} }}, users: [ {{ user: a, password: a }} ] }} }}\n"
        "no_auth_user: a\n"
    )
    return NatsServer(folder, "-c", str(conf))


async def test_each_stream_has_a_bound_where_the_account_wants_one(tmp_path: Path) -> None:
    server = limited(tmp_path, "1GB", "1GB, max_bytes_required: true, disk_max_stream_bytes: 300MB")
    server.start()
    try:
        async with connected(server) as connection:
            assert await topology.ensure(connection, settings(server), MODEL)
            assert await topology.ensure(connection, settings(server), MODEL) == []
            made = [info.config for info in await connection.jetstream.streams_info()]
    finally:
        server.stop()
    assert len(made) == len(streams.stream_configs(settings(server)))
    assert all(1_000_000 < config.max_bytes <= 300 * 2**20 for config in made)
    assert sum(config.max_bytes for config in made) < 2**30


@pytest.mark.parametrize("storage", [5e9, 1e9, 8e6])
def test_bounds_of_all_streams_are_within_the_account(storage: float) -> None:
    configs = bounded(streams.stream_configs(Settings(_env_file=None), storage), storage)
    assert all(config.max_bytes for config in configs)
    assert sum(config.max_bytes for config in configs) <= storage


async def test_an_installation_without_stored_answers_gets_them(tmp_path: Path) -> None:
    server = limited(tmp_path, "8MB", "8MB")
    server.start()
    try:
        async with connected(server) as connection:
            wanted = settings(server)
            for config in streams.stream_configs(wanted, 8 * 2**20):
                if config.name not in (names.ANSWERS, names.bucket_stream(names.RESPONSES_BUCKET)):
                    # Requests had three quarters of the account's storage.
                    most = 6 * 2**20 if config.name == names.STREAM else config.max_bytes
                    await connection.jetstream.add_stream(replace(config, max_bytes=most))
            await connection.jetstream.add_consumer(names.STREAM, streams.consumer_config(wanted, MODEL))
            for stream, shared in streams.API_CONSUMERS.items():
                await connection.jetstream.add_consumer(stream, shared)
            await publish(connection, 5)
            assert await topology.ensure(connection, wanted, MODEL) == [
                "stream INFERENCE: max_bytes 6291456 → 4194304",
                "stream INFERENCE_ANSWERS made",
                "stream KV_inference-responses made",
            ]
            assert await topology.ensure(connection, wanted, MODEL) == []
            assert (await connection.jetstream.stream_info(names.STREAM)).state.messages == 5
            answers = (await connection.jetstream.stream_info(names.ANSWERS)).config
            assert answers.max_bytes == int(8 * 2**20 * streams.ANSWER_SHARE)
            assert answers.republish.dest == "inference.answered.{{wildcard(1)}}"
    finally:
        server.stop()


async def test_a_server_with_less_room_than_stored_answers_may_take(tmp_path: Path) -> None:
    server = limited(tmp_path, "100MB", "-1")
    server.start()
    try:
        async with connected(server) as connection:
            with pytest.raises(ConfigurationError, match=r"insufficient.*, or lower ANSWER_LOG_BYTES"):
                await topology.ensure(connection, settings(server), MODEL)
            fits = settings(server, answer_log_bytes=50 * 10**6, file_store_bytes=20 * 10**6)
            assert "stream INFERENCE_ANSWERS made" in await topology.ensure(connection, fits, MODEL)
    finally:
        server.stop()


async def test_five_at_once_agree(nats_server: NatsServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connected(nats_server)) for _ in range(5)]
        wanted = settings(nats_server)
        changes = await asyncio.gather(*(topology.ensure(connection, wanted, MODEL) for connection in connections))
        assert sorted({change for some in changes for change in some}) == sorted(
            [f"stream {config.name} made" for config in streams.stream_configs(wanted)]
            + ["consumer webhooks made", "consumer batches made", f"consumer {TOKEN} made"]
        )
        assert len(await consumers(connections[0])) == 1


async def test_changed_settings_are_applied_without_losing_a_message(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server, max_concurrent_requests=1), MODEL)
        await publish(connection, 5)
        changed = settings(
            nats_server,
            max_queue_size=6,
            max_concurrent_requests=4,
            ack_wait=9,
            request_state_ttl=1800,
        )
        changes = await topology.ensure(connection, changed, MODEL)
        assert set(changes) >= {
            "stream INFERENCE: max_msgs 100 → 6",
            "stream KV_inference-requests: max_age 3600.0 → 1800.0",
            f"consumer {TOKEN}: ack_wait 5.0 → 9.0",
            f"consumer {TOKEN}: max_ack_pending 1 → 4",
        }
        assert await topology.ensure(connection, changed, MODEL) == []
        stream = await connection.jetstream.stream_info(names.STREAM)
        (consumer,) = await consumers(connection)
    assert (stream.config.max_msgs, stream.state.messages) == (6, 5)
    assert (consumer.config.max_ack_pending, consumer.num_pending) == (4, 5)


async def test_a_default_overrides_nothing(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        told = {"max_queue_size": 7, "max_concurrent_requests": 3, "ack_wait": 9, "usage_days": 9, "file_ttl": 864_000}
        told |= {"response_ttl": 99_000, "request_state_ttl": 1800, "answer_log_bytes": 2**21, "key_max_deferred": 5}
        await topology.ensure(connection, settings(nats_server, **told), MODEL)
        for join in (topology.drift, topology.ensure):
            assert await join(connection, settings(nats_server), MODEL) == []
        found = await topology.live_limits(connection, settings(nats_server, ack_wait=5), MODEL)
        assert {name: found.live[name] for name in told} == told
        differences = found.differences()
        assert len(differences) == len(told)
        assert differences[0] == "ACK_WAIT=5 is set here, and NATS has 9: another process was told so"
        assert "MAX_QUEUE_SIZE is 7 on NATS and stays so: it is not set here (default 100)" in differences
        # What is set is applied, and nothing else.
        assert await topology.ensure(connection, settings(nats_server, max_queue_size=100), MODEL) == [
            "stream INFERENCE: max_msgs 7 → 100"
        ]


async def test_a_default_does_not_win_a_race(nats_server: NatsServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(connected(nats_server)) for _ in range(3)]
        told = settings(nats_server, max_queue_size=7, max_concurrent_requests=3)
        silent = settings(nats_server)
        # Nothing is there yet; then all but the consumer of another model.
        for model in (MODEL, "org/other"):
            await asyncio.gather(
                topology.ensure(first, silent, model),
                topology.ensure(second, told, model),
                topology.ensure(third, silent, model),
            )
            live = (await topology.live_limits(first, silent, model)).live
            assert (live["max_queue_size"], live["max_concurrent_requests"]) == (7, 3)


async def test_a_smaller_queue_keeps_what_was_admitted(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server), MODEL)
        await publish(connection, 5)
        await topology.ensure(connection, settings(nats_server, max_queue_size=2), MODEL)
        stream = await connection.jetstream.stream_info(names.STREAM)
    assert (stream.config.max_msgs, stream.state.messages) == (2, 5)


async def test_a_smaller_waiting_room_keeps_what_waits(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server), MODEL)
        for number in range(4):
            await connection.jetstream.publish(names.deferred_subject(MODEL, "a"), str(number).encode())
        for wanted, left in ((3, 4), (5, 5)):
            await topology.ensure(connection, settings(nats_server, key_max_deferred=wanted), MODEL)
            live = await connection.jetstream.stream_info(names.DEFERRED)
            assert (live.config.max_msgs_per_subject, live.state.messages) == (left, 4)


async def test_a_raised_limit_serves_a_pull_that_waits(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server), MODEL)
        await publish(connection, 2)
        queue = JetStreamDeliveries(connection, MODEL)
        first = await queue.pull()
        second = asyncio.create_task(queue.pull())
        await flushed(connection.client)
        assert not second.done()
        await topology.ensure(connection, settings(nats_server, max_concurrent_requests=2), MODEL)
        assert (await second).sequence == first.sequence + 1
        await queue.stop()


async def test_two_models_share_the_stream(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server), MODEL)
        assert await topology.ensure(connection, settings(nats_server), "org/other") == ["consumer org-other made"]
        assert len(await consumers(connection)) == 2


async def test_two_models_of_one_token_are_refused(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await topology.ensure(connection, settings(nats_server), "org/model")
        with pytest.raises(ConfigurationError, match=r"'org/model' and 'org\.model' both become 'org-model'"):
            await topology.ensure(connection, settings(nats_server), "org.model")


async def test_more_replicas_than_servers_are_refused(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        with pytest.raises(ConfigurationError, match=r"NATS refuses the topology: .*replicas"):
            await topology.ensure(connection, settings(nats_server, nats_replicas=3), MODEL)


@contextlib.asynccontextmanager
async def old_server(version: str) -> AsyncIterator[str]:
    """A server that says hello in the protocol of `version`, and nothing of interest after that."""
    info = {"server_id": "x", "version": version, "proto": 1, "max_payload": 1_048_576, "headers": True}
    talks: set[asyncio.Task[None]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*talks)
        await server.wait_closed()


async def test_an_old_server_is_refused_by_name() -> None:
    async with old_server("2.10.29") as url:
        with pytest.raises(ConfigurationError, match=r"nats-server 2\.10\.29 is too old: Forebay needs 2\.12 or newer"):
            await connect(load(Settings, nats_url=url), "test")


async def test_no_server_is_said_at_once(nats_server: NatsServer) -> None:
    nats_server.stop()
    with pytest.raises(QueueUnavailable, match=r"cannot reach NATS at nats://127\.0\.0\.1:\d+: .*Connect call failed"):
        await connect(load(Settings, nats_url=nats_server.url), "test")


async def test_a_password_is_not_repeated(nats_server: NatsServer) -> None:
    nats_server.stop()
    url = nats_server.url.replace("nats://", "nats://user:secret@")
    with pytest.raises(QueueUnavailable) as refused:
        await connect(load(Settings, nats_url=url), "test")
    assert "secret" not in str(refused.value)
