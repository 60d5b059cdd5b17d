"""The page moves with the queue, says what it does not know, and outlives what it is fed by."""

import asyncio
import re
import signal

from playwright.async_api import expect

from forebay_contracts.wire.state import RequestStatus
from support.browser import Window, Windows
from support.nats import NatsServer
from support.page import FOR_EVER, ids, leave, load
from support.ports import port_of
from support.stack import Stack, running
from support.view import holds

NO_NUMBER = "\N{EN DASH}"
TILES = ("queue_size", "processing_count", "active_requests", "max_concurrent", "max_queue_size", "total_queued")
TOTALS = ("total_processed", "total_failed", "total_timed_out", "total_cancelled", "deferred")
VIEWS = ("", "requests", "models", "batches", "usage", "chat", "request/unknown")


async def same_numbers(window: Window, stack: Stack) -> None:
    """Wait until the overview shows what `/v1/queue/status` says, read while nothing moves."""
    status = await stack.status()
    for name in (*TILES, *(name for name in TOTALS if name != "total_failed")):
        await window.shows(f"#{name}", str(status[name]))
    await window.shows("#total_failed", str(status["total_failed"]))


async def test_it_loads_and_asks_nobody_else(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await same_numbers(window, stack)
        await window.shows("#attention", "✓ Nothing needs attention.")
        await window.shows("#running-none", "nothing")
        answer = await stack.http.get(window.url)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; frame-ancestors 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (await stack.http.get(window.url + "page/docs.html")).status_code == 404
        assert "Leon Sorokin" in (await stack.http.get(window.url + "page/uplot.LICENSE")).text
        for view in VIEWS[:-1]:
            await window.to(view)
            await expect(window.page.locator("nav a[aria-current=page]")).to_have_attribute("href", f"#/{view}")
            assert await window.page.locator("main > div:visible").count() == 1
        await expect(window.page).to_have_title("Chat · Forebay")
        assert (window.elsewhere(), window.complaints) == ([], [])


async def test_it_moves_while_a_load_runs(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, max_concurrent_requests=2) as stack, windows.open(stack) as window:
        await window.live()
        # As many as wait for ever, so that the numbers hold still while they are compared.
        sent = load(stack, 6, FOR_EVER)
        await holds(stack, 6)
        await window.shows("#queue_size", "4")
        await same_numbers(window, stack)
        await expect(window.page.locator("#chart")).to_have_attribute(
            "aria-label", re.compile(r"^4 waiting, 2 running, 0 deferred; at most 4 waiting and 2 running since \d")
        )
        await expect(window.page.locator("#running .state-processing")).to_have_count(2)
        # The model, and what its worker does, which a heartbeat tells.
        await window.to("models")
        card = window.page.locator("#models .model")
        await expect(card.locator(".facts")).to_have_text(re.compile(r"waiting4running2 of 2deferred0"))
        await expect(card.locator("tbody tr")).to_have_text(re.compile(rf"^{stack.workers[0].id}ready2 of 2simulated"))
        await expect(card.locator(".badge")).to_have_text("1 ready")
        await window.to("requests")
        await expect(window.page.locator("#requests .state-queued")).to_have_count(4)
        await leave(*sent)
        await holds(stack, 0)
        await expect(window.page.locator("#requests .state-cancelled")).to_have_count(6)
        for answer in await asyncio.gather(*load(stack, 5, "[[tokens=2]]"), stack.chat("[[fail]]")):
            assert answer.status_code in (200, 500)
        await expect(window.page.locator("#requests .state-failed")).to_have_count(1)
        await expect(window.page.locator("#requests .state-completed")).to_have_count(5)
        await window.to("")
        await same_numbers(window, stack)
        failed = "1 request for HuggingFaceTB/SmolLM2-135M-Instruct failed"
        await expect(window.page.locator("#attention .bad")).to_have_text(
            re.compile(rf"{failed} on .*: .*ordered to fail")
        )
        await window.page.locator("#attention .bad a").click()
        await expect(window.page.locator("#requests tr")).to_have_count(1)
        assert await window.page.locator("#filter").input_value() == (
            f"state:failed model:HuggingFaceTB/SmolLM2-135M-Instruct worker:{stack.workers[0].id}"
        )
        assert window.complaints == []


async def test_it_recovers_after_the_api_was_killed(nats_server: NatsServer, windows: Windows) -> None:
    """What changed meanwhile, of more requests than a message holds, is shown as it is."""
    port = port_of(windows)
    async with running(nats_server, apis=0, max_concurrent_requests=64) as stack:
        first = await stack.api(api_port=port)
        await stack.api()
        async with windows.open(stack) as window:
            await window.live()
            await window.to("requests")
            sent = [asyncio.create_task(stack.chat("[[tokens=100 delay_ms=50]]", api=1)) for _ in range(60)]
            await expect(window.page.locator("#requests .state-processing")).to_have_count(50)
            await first.kill()
            await window.shows("#connection", re.compile("^no connection to the api.* · as of "))
            # What was seen last is still there.
            await expect(window.page.locator("#requests .state-processing")).to_have_count(50)
            await expect(window.page.locator("body")).to_have_class(re.compile("stale"))
            assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}
            await holds(stack, 0)
            await stack.api(api_port=port)
            await window.live()
            await expect(window.page.locator("#requests .state-completed")).to_have_count(50)
            for request_id in await ids(window):
                state = await stack.state(request_id)
                assert state is not None
                assert state.status is RequestStatus.COMPLETED
            assert all("Failed to load resource" in told or "ERR_" in told for told in window.complaints)


async def test_an_open_page_does_not_hold_the_end_of_an_api_up(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, drain_timeout=20) as stack, windows.open(stack) as window:
        await window.live()
        async with asyncio.timeout(15):
            assert await stack.apis[0].stop() == 0
        await window.page.locator("#connection.bad").wait_for()


async def test_a_connection_that_says_nothing_is_given_up(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        stack.apis[0].signal(signal.SIGSTOP)
        await window.shows("#connection", re.compile("^no event for 10 s, reconnecting · as of "))
        stack.apis[0].signal(signal.SIGCONT)
        await window.live()


async def test_nats_away_leaves_what_was_seen_and_says_so(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        sent = load(stack, 2, FOR_EVER)
        await window.shows("#queue_size", "1")
        await asyncio.to_thread(nats_server.stop)
        await window.shows("#connection", re.compile(r"^NATS cannot be reached · as of \d"))
        await expect(window.page.locator("body")).to_have_class(re.compile("stale"))
        assert await window.page.inner_text("#queue_size") == "1"
        await window.to("models")
        await expect(window.page.locator("#models .badge")).to_have_text("1 ready")
        # A page that is opened now gets no events at all. It shows nothing as empty that is unknown.
        await window.to("")
        await window.page.reload()
        await window.shows("#connection", "NATS cannot be reached")
        assert await window.page.inner_text("#queue_size") == NO_NUMBER
        await window.shows("#attention", "Unknown: NATS cannot be reached.")
        await window.shows("#running-none", "unknown")
        await asyncio.to_thread(nats_server.start)
        await window.live()
        await expect(window.page.locator("body")).not_to_have_class(re.compile("stale"))
        await leave(*sent)
