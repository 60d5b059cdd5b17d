"""What keys used, on the whole system: exact over kills, seen by whom it concerns, and limited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forebay_api.clients import usage_history
from forebay_contracts import keys
from forebay_contracts.queueing.usage import DAY_S, grouped, last_days
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus
from support.answers import chat_body, summary, user
from support.command import forebay
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

KEYS = {name: f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "bob", "ops")}
NAME = f"HuggingFaceTB/{MODEL}"
OLD, GROUP = {"from": "2020-01-01"}, {"group_by": "user"}
TODAY = 2
"""Days that certainly hold what a test used."""


@contextlib.asynccontextmanager
async def with_keys(nats: NatsServer, folder: Path, **settings: Any) -> AsyncIterator[Stack]:
    """A stack for alice, bob, who may use little, and ops, an operator."""
    limits: dict[str, Any] = {
        "bob": {"max_requests": 5, "tokens_per_minute": 60, "tokens_per_day": 100},
        "ops": {"operator": True},
    }
    file = folder / "keys.toml"
    file.write_text("\n".join(keys.written(name, key, **limits.get(name, {})) for name, key in KEYS.items()))
    async with running(nats, api_keys_file=file, max_concurrent_requests=8, **settings) as stack:
        yield stack


async def ask(stack: Stack, name: str, orders: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEYS[name]}"}
    url = f"{stack.apis[0].url}/v1/chat/completions"
    return await stack.http.post(url, json=chat_body(f"[[{orders}]]"), headers=headers)


async def seen(stack: Stack, name: str, **query: Any) -> Any:
    """`GET /v1/usage` with a key."""
    headers = {"authorization": f"Bearer {KEYS[name]}"}
    answer = await stack.http.get(f"{stack.apis[0].url}/v1/usage", headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def idle(stack: Stack) -> None:
    """Wait until every request has been counted, and its message acknowledged, which leaves no event."""
    async with asyncio.timeout(30):
        while (await stack.connection.jetstream.stream_info(names.STREAM)).state.messages:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_totals_are_exact_although_a_worker_and_nats_are_killed(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, workers=2) as stack:
        asked = [("alice", 5)] * 16 + [("bob", 1)] * 3
        tasks = [asyncio.create_task(ask(stack, name, f"tokens={n} delay_ms=100")) for name, n in asked]
        await stack.becomes(lambda state: state.status is RequestStatus.COMPLETED)
        await stack.workers[0].kill()
        await asyncio.to_thread(nats_server.kill)
        await asyncio.to_thread(nats_server.start)
        expected: dict[str, list[int]] = {}
        for (name, _), answer in zip(asked, await asyncio.gather(*tasks), strict=True):
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            counts = 1, usage["prompt_tokens"], usage["completion_tokens"]
            expected[name] = [a + b for a, b in zip(expected.get(name, [0, 0, 0]), counts, strict=True)]
        await idle(stack)
        rows = grouped(await stack.states.usage(last_days(TODAY)), ["key"])
        counted = {row.key: [row.requests, row.prompt_tokens, row.completion_tokens] for row in rows}
        assert counted == expected
        assert all(row.queue_seconds > 0 for row in rows)


async def test_who_sees_what_and_who_is_stopped(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_keys(nats_server, tmp_path) as stack:
        client = stack.openai(api_key=KEYS["bob"])
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=user("[[tokens=70]]"))
        usage = raw.parse().usage
        assert usage is not None
        assert usage.total_tokens > 60
        told = {name: value for name, value in raw.headers.items() if name.startswith("x-ratelimit-")}
        assert told == {
            "x-ratelimit-limit-requests": "5",
            "x-ratelimit-remaining-requests": "5",
            "x-ratelimit-reset-requests": "0ms",
            "x-ratelimit-limit-tokens": "60",
            "x-ratelimit-remaining-tokens": "60",
            "x-ratelimit-reset-tokens": "0ms",
        }
        # The api reads the counters once a second, which leaves no event.
        async with asyncio.timeout(30):
            while (refused := await ask(stack, "bob", "tokens=0")).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert summary(refused) == (429, "tokens", "rate_limit_exceeded", None)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=MODEL, messages=user("hi"))
        answer = await ask(stack, "alice", "tokens=3")
        assert not [name for name in answer.headers if name.startswith("x-ratelimit-")]
        await idle(stack)

        alice = (await seen(stack, "alice"))["data"]
        assert [(row["key"], row["model"], row["requests"], row["completion_tokens"]) for row in alice] == [
            ("alice", NAME, 1, 3)
        ]
        assert (await seen(stack, "alice", key="bob"))["data"] == []
        assert (await seen(stack, "alice", model=MODEL))["data"] == alice
        assert (await seen(stack, "alice", model="135M-Instruct"))["data"] == []
        everything = await seen(stack, "ops", group_by="key")
        assert [row["key"] for row in everything["data"]] == ["alice", "bob"]
        assert set(everything["data"][0]) == set(everything["total"]) | {"key"}
        assert everything["total"]["requests"] == sum(row["requests"] for row in everything["data"]) > 2
        old = {"from": "2026-01-01", "to": "2026-01-31"}
        assert (await seen(stack, "ops", **old)) == {"object": "list", **old, "data": [], "total": empty()}
        assert (await seen(stack, "ops", to="0001-01-01"))["from"] == "0001-01-01"
        for query in ({"from": "today"}, {"from": "2026-02-01", "to": "2026-01-31"}, {"to": "2026-01-01"} | OLD, GROUP):
            url, headers = f"{stack.apis[0].url}/v1/usage", {"authorization": f"Bearer {KEYS['ops']}"}
            assert summary(await stack.http.get(url, headers=headers, params=query))[0] == 400
        shown = await forebay(
            *("usage", "--days", str(TODAY), "--key", "alice", "--model", MODEL, "--json"),
            data_dir=tmp_path,
            nats_url=nats_server.url,
        )
        assert shown.json() == alice
        shown = await forebay("usage", "--by", "key", "--json", data_dir=tmp_path, nats_url=nats_server.url)
        assert shown.json() == everything["data"]
        # Of a day that is over, the sums stay.
        monkeypatch.setattr(usage_history, "LATE_S", -DAY_S)
        await usage_history.thin_out(stack.connection)
        assert (await stack.connection.jetstream.stream_info(names.USAGE)).state.messages == 2
        assert await seen(stack, "ops", group_by="key") == everything
        metrics = (await stack.http.get(f"{stack.apis[0].url}/metrics")).text
        assert f'forebay_usage_today_tokens{{direction="output",key="alice",model="{NAME}"}} 3.0' in metrics


def empty() -> dict[str, float]:
    return dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "queue_seconds"), 0)
