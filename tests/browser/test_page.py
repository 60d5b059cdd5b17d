import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from forebay_contracts.messages import RequestStatus
from support.browser import Window, Windows
from support.nats import NatsServer
from support.ports import port_of
from support.stack import Stack, running
from support.view import holds

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TILES = ("queue_size", "processing_count", "active_requests", "max_concurrent", "max_queue_size", "total_queued")
TOTALS = ("total_processed", "total_failed", "total_timed_out", "total_cancelled")


async def newest_id(window: Window, status: str) -> str:
    """The id of a request that the page shows in this state."""
    row = window.page.locator("#requests tr", has=window.page.locator(f".state-{status}")).first
    await row.wait_for()
    return await row.locator("td.id").inner_text()


async def same_numbers(window: Window, stack: Stack) -> None:
    """Wait until the page shows what `/v1/queue/status` says, read while nothing moves."""
    status = await stack.status()
    for name in (*TILES, *TOTALS):
        await window.shows(f"#{name}", str(status[name]))


def load(stack: Stack, count: int, text: str) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(stack.chat(text)) for _ in range(count)]


async def test_it_loads_and_asks_nobody_else(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await same_numbers(window, stack)
        worker = await window.page.inner_text("#workers td.id")
        assert worker == stack.workers[0].id
        assert await window.page.inner_text("#models td:last-child") == "1 ready"
        answer = await stack.http.get(window.url)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; frame-ancestors 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (window.elsewhere(), window.complaints) == ([], [])


async def test_it_moves_while_a_load_runs(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, max_concurrent_requests=2) as stack, windows.open(stack) as window:
        await window.live()
        # As many as wait for ever, so that the numbers hold still while they are compared.
        sent = load(stack, 6, "[[tokens=2000 delay_ms=500]]")
        await holds(stack, 6)
        await window.shows("#queue_size", "4")
        await same_numbers(window, stack)
        assert (await window.number("processing_count"), await window.number("max_concurrent")) == (2, 2)
        await expect(window.page.locator("#requests .state-processing")).to_have_count(2)
        await expect(window.page.locator("#requests .state-queued")).to_have_count(4)
        await expect(window.page.locator("#chart path.line")).to_have_count(2)
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        await holds(stack, 0)
        await window.shows("#total_cancelled", "6")
        for answer in await asyncio.gather(*load(stack, 5, "[[tokens=2]]"), stack.chat("[[fail]]")):
            assert answer.status_code in (200, 500)
        await window.shows("#total_processed", "5")
        await window.shows("#total_failed", "1")
        await same_numbers(window, stack)
        # Why it failed, and at which attempt, at one look.
        failed = window.page.locator("#requests tr", has=window.page.locator(".state-failed"))
        assert await failed.locator("td").nth(7).inner_text() == "3"
        state = await stack.state(await failed.locator("td.id").inner_text())
        assert state is not None
        assert state.error
        assert await failed.locator("td.error").inner_text() == state.error
        assert window.complaints == []


async def test_a_request_is_looked_up_and_cancelled(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        sent = load(stack, 2, "[[tokens=2000 delay_ms=500]]")
        running_id, waiting_id = await newest_id(window, "processing"), await newest_id(window, "queued")
        await window.page.get_by_role("button", name=f"Cancel {waiting_id}").click()
        await stack.reaches(waiting_id, RequestStatus.CANCELLED)
        await window.shows("#message", f"{waiting_id} is cancelled")
        await window.page.get_by_label("Id", exact=True).fill(running_id)
        await window.page.keyboard.press("Enter")
        await window.page.locator("#look-result .state-processing").wait_for()
        await window.page.get_by_role("button", name="Cancel it").click()
        await stack.reaches(running_id, RequestStatus.CANCELLED)
        await window.page.locator("#look-result .state-cancelled").wait_for()
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {499}
        await expect(window.page.locator("#requests .state-processing, #requests .state-queued")).to_have_count(0)
        assert window.complaints == []


async def test_it_recovers_after_the_api_restarts(nats_server: NatsServer, windows: Windows) -> None:
    port = port_of(windows)
    async with running(nats_server, apis=0, drain_timeout=20) as stack:
        first = await stack.api(api_port=port)
        async with windows.open(stack) as window:
            await window.live()
            # A page that is open does not hold the api's end up.
            async with asyncio.timeout(15):
                assert await first.stop() == 0
            await window.page.locator("#connection.bad").wait_for()
            await stack.api(api_port=port)
            await window.live()
            assert (await stack.chat("[[tokens=2]]", api=1)).status_code == 200
            await window.page.locator("#requests .state-completed").wait_for()
            assert all("Failed to load resource" in told for told in window.complaints), window.complaints


async def test_it_works_with_an_api_key(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, api_keys="first,second") as stack, windows.open(stack) as window:
        refused = await stack.http.get(window.url + "v1/queue/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        await window.shows("#connection", "an API key is needed")
        await window.page.get_by_label("API key").fill("second")
        await window.page.keyboard.press("Enter")
        await window.live()
        assert await window.page.evaluate("sessionStorage.getItem('forebay-api-key')") == "second"
        await window.page.get_by_label("Message").fill("[[tokens=2]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .assistant", "t0 t1")
        assert all("401" in complaint for complaint in window.complaints), window.complaints
        assert not [url for url in window.asked if "second" in url]


async def test_a_chat_by_keyboard_alone(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await expect(window.page.locator("#chat-model option")).to_have_count(1)
        ahead = load(stack, 2, "[[tokens=2000 delay_ms=500]]")
        await holds(stack, 2)
        keyboard = window.page.keyboard
        await keyboard.press("Tab")  # the link that skips to the chat
        await keyboard.press("Enter")
        await keyboard.type("[[tokens=3 delay_ms=20]]")
        await keyboard.press("Enter")
        await window.shows("#chat-status", re.compile("^in the queue: place 2"))
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        await window.shows("#chat-log .assistant", "t0 t1 t2")
        await window.shows("#chat-status", re.compile(r"^first token after \d+\.\d\d s, 3 pieces"))
        # The focus is back where the next message is written, and Escape stops an answer.
        await keyboard.type("[[tokens=2000 delay_ms=50]]")
        await keyboard.press("Enter")
        await window.shows("#chat-log .assistant:last-child", re.compile("t2"))
        await keyboard.press("Escape")
        await window.shows("#chat-status", "stopped")
        await holds(stack, 0)
        assert window.complaints == []


async def test_an_error_while_it_waits_is_told(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0, request_timeout=1) as stack, windows.open(stack) as window:
        await window.shows("#connection", "no worker is ready")
        await window.page.get_by_label("Message").fill("hello")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .failure", "the request was not finished within 1 seconds")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_screenshots_for_the_docs(nats_server: NatsServer, windows: Windows, scheme: str, tmp_path: Path) -> None:
    """Under load; into docs/images where UPDATE_SCREENSHOTS is set."""
    async with (
        running(nats_server, max_concurrent_requests=4, worker_slots=2, workers=2) as stack,
        windows.open(stack, scheme) as window,
    ):
        await window.live()
        await stack.chat("[[fail]]")
        sent = load(stack, 30, "[[tokens=8 delay_ms=60]]")
        await window.page.get_by_label("Message").fill("[[tokens=12 delay_ms=20]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#total_processed", re.compile("^(1[6-9]|[23].)$"))
        folder = IMAGES if os.environ.get("UPDATE_SCREENSHOTS") else tmp_path
        image = await window.page.screenshot(path=folder / f"page-{scheme}.png", animations="disabled")
        assert 20_000 < len(image) < 300_000
        ground = await window.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(245, 247, 249)", "dark": "rgb(16, 23, 29)"}[scheme]
        await asyncio.gather(*sent)
        assert window.complaints == []
