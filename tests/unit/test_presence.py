"""Who is called dead, and who is not yet."""

import asyncio
import time
from collections.abc import Callable

import pytest

from forebay_contracts.nats import presence as module
from forebay_contracts.nats.connection import Connection, connected
from forebay_contracts.nats.presence import HEARTBEAT_TTL_S, Heartbeat, Presence
from forebay_contracts.nats.topology import ensure
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo
from support.nats import NatsServer, flushed


async def watching(
    connection: Connection, settings: Settings, asked: Callable[[str], str] | None = None
) -> Presence[ApiInfo]:
    await ensure(connection, settings, settings.served_model)
    presence = Presence(connection, names.APIS_BUCKET, ApiInfo, asked)
    await presence.start()
    return presence


async def beating(connection: Connection) -> Heartbeat[ApiInfo]:
    """The heartbeat of an api `a`, that everybody has heard."""
    heartbeat = Heartbeat(
        connection, names.APIS_BUCKET, lambda: ApiInfo(id="a", version="1", started_at=0, heartbeat_at=0)
    )
    await heartbeat.start()
    await flushed(connection.client)
    return heartbeat


async def test_a_stranger_may_still_be_heard_of(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    async with connected(settings, "test") as connection:
        presence = await watching(connection, settings)
        assert presence.is_alive("early")
        now = time.monotonic()
        monkeypatch.setattr(presence, "_attentive_at", now + HEARTBEAT_TTL_S + 1)
        monkeypatch.setattr(time, "monotonic", lambda: now + HEARTBEAT_TTL_S + 1)
        assert not presence.is_alive("early")
        assert presence.is_alive("later")
        await presence.stop()


async def test_who_said_good_bye_is_gone_at_once(nats_server: NatsServer) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    async with connected(settings, "test") as connection:
        presence = await watching(connection, settings)
        heartbeat = await beating(connection)
        assert [info.id for info in presence.alive()] == ["a"]
        await heartbeat.stop()
        await flushed(connection.client)
        assert not presence.is_alive("a")
        await presence.stop()


async def test_who_is_there_already_is_heard_where_the_bucket_cannot_be_read_yet(nats_server: NatsServer) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    async with connected(settings, "test") as connection:
        presence = Presence(connection, names.APIS_BUCKET, ApiInfo)
        await presence.start()
        assert presence.alive() == []
        await ensure(connection, settings, settings.served_model)
        heartbeat = await beating(connection)
        assert [info.id for info in presence.alive()] == ["a"]
        await heartbeat.stop()
        await presence.stop()


async def test_a_service_knows_that_others_may_have_taken_it_for_dead(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    async with connected(settings, "test") as connection:
        await ensure(connection, settings, settings.served_model)
        heartbeat = await beating(connection)
        assert not heartbeat.lapsed
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + HEARTBEAT_TTL_S + 1)
        assert heartbeat.lapsed  # at once, before any heartbeat of its own
        for lapsed in (True, False):
            await heartbeat._put()
            assert heartbeat.lapsed is lapsed
        await heartbeat.stop()


async def test_a_silent_member_is_dead_once_it_has_no_connection(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    interval_s, ttl_s, stall_s = 0.1, 0.4, 1.2
    for name, value in (("HEARTBEAT_INTERVAL_S", interval_s), ("HEARTBEAT_TTL_S", ttl_s), ("STALL_TTL_S", stall_s)):
        monkeypatch.setattr(module, name, value)
    async with connected(settings, "test") as connection, connected(settings, "api") as api:
        presence = await watching(connection, settings, names.connected_subject)
        await api.client.subscribe(names.reply_subjects("busy"))
        await flushed(api.client)
        lost = asyncio.Event()
        presence.on_lost.append(lost.set)
        heartbeat = await beating(connection)
        assert heartbeat._task is not None
        heartbeat._task.cancel()  # as a service that is killed
        began = time.monotonic()

        async def dies(member: str) -> float:
            """After how many seconds it is dead. Silence leaves no event to wait for."""
            while presence.is_alive(member):  # noqa: ASYNC110
                await asyncio.sleep(interval_s / 10)
            return time.monotonic() - began

        async with asyncio.timeout(30):
            gone_s, busy_s = await asyncio.gather(dies("gone"), dies("busy"))
            await lost.wait()
        assert ttl_s <= gone_s < busy_s
        assert stall_s <= busy_s
        await presence.stop()


async def test_whoever_was_away_for_a_moment_calls_nobody_dead(nats_server: NatsServer) -> None:
    settings = load(Settings, nats_url=nats_server.url, _env_file=None)
    async with connected(settings, "test") as connection:
        presence = await watching(connection, settings)
        heartbeat = await beating(connection)
        await heartbeat.stop()
        await flushed(connection.client)
        assert not presence.is_alive("a")
        again = asyncio.Event()

        async def back() -> None:
            again.set()

        connection.on_reconnect.append(back)
        await asyncio.to_thread(nats_server.restart)
        await again.wait()
        # Heartbeats may have been lost, so their absence says nothing.
        assert presence.is_alive("a")
        await presence.stop()
