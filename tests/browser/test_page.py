"""The page moves with the queue, tells what became of requests, and outlives what it is fed by."""

import asyncio
import re
import signal
import time

import pytest
from playwright.async_api import expect

from forebay_contracts.wire.state import RequestStatus
from support.browser import Window, Windows
from support.nats import NatsServer
from support.page import FOR_EVER, leave, load, newest_id
from support.ports import port_of
from support.stack import Stack, running
from support.view import holds

TILES = ("queue_size", "processing_count", "active_requests", "max_concurrent", "max_queue_size", "total_queued")
TOTALS = ("total_processed", "total_failed", "total_timed_out", "total_cancelled")


async def same_numbers(window: Window, stack: Stack) -> None:
    """Wait until the page shows what `/v1/queue/status` says, read while nothing moves."""
    status = await stack.status()
    for name in (*TILES, *TOTALS):
        await window.shows(f"#{name}", str(status[name]))
    lines = {line["model"]: line for line in status["models"]}
    for model, waiting, processing, *_ in await window.table("models"):
        line = lines.pop(model)
        assert (waiting, processing) == (str(line["waiting"]), f"{line['processing']} of {line['max_concurrent']}")
    assert not lines


async def same_requests(window: Window, stack: Stack) -> None:
    """Hold the rows against the states of requests that have ended."""
    for row in await window.table("requests"):
        state = await stack.state(row[0])
        assert state is not None
        assert state.finished_at is not None
        started = state.started_at or state.finished_at
        assert row[1:5] == [state.status.replace("_", " "), state.completion_type, state.model, state.worker or ""]
        assert row[6] == f"{started - state.queued_at:.2f} s"
        assert row[7] == (f"{state.finished_at - started:.2f} s" if state.started_at else "")
        assert row[8] == (str(state.attempt) if state.attempt else "")
        assert row[9].split("\n") == [told for told in (state.error, state.fault) if told] or [""]


async def line_of(window: Window, name: str) -> tuple[str, float]:
    """A line of the chart as it is drawn, and the number that it ends at by the labels beside it."""
    path = await window.page.locator(f"#chart .line.{name}").get_attribute("d")
    assert path is not None
    top = int(await window.page.inner_text("#chart-top"))
    return path, (139 - float(path.rsplit(" ", 1)[1])) / 138 * top


async def test_it_loads_and_asks_nobody_else(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await same_numbers(window, stack)
        answer = await stack.http.get(window.url)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; frame-ancestors 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (await stack.http.get(window.url + "page/docs.html")).status_code == 404
        assert (window.elsewhere(), window.complaints) == ([], [])


async def test_it_moves_while_a_load_runs(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, max_concurrent_requests=2) as stack, windows.open(stack) as window:
        await window.live()
        before = {name: await line_of(window, name) for name in ("waiting", "processing")}
        assert [number for _, number in before.values()] == pytest.approx([0, 0], abs=0.05)
        # As many as wait for ever, so that the numbers hold still while they are compared.
        sent = load(stack, 6, FOR_EVER)
        await holds(stack, 6)
        await window.shows("#queue_size", "4")
        await same_numbers(window, stack)
        assert (await window.number("processing_count"), await window.number("max_concurrent")) == (2, 2)
        after = {name: await line_of(window, name) for name in ("waiting", "processing")}
        assert all(after[name][0] != before[name][0] for name in before)
        assert [number for _, number in after.values()] == pytest.approx([4, 2], abs=0.05)
        await expect(window.page.locator("#chart")).to_have_attribute(
            "aria-label", re.compile(r"^4 waiting, 2 processing; at most 4 waiting and 2 processing in the last \d+ s$")
        )
        await expect(window.page.locator("#requests .state-processing")).to_have_count(2)
        await expect(window.page.locator("#requests .state-queued")).to_have_count(4)
        # The line of the model, and what its worker does, which a heartbeat tells.
        model = (await stack.status())["models"][0]["model"]
        assert await window.table("models") == [[model, "4", "2 of 2", "", "1 ready"]]
        await expect(window.page.locator("#models .sparkline")).to_have_attribute(
            "aria-label", re.compile(r"^4 waiting, at most 4; 2 processing, at most 2 in the last \d+ s$")
        )
        await window.shows("#workers td:nth-child(4)", "2 of 2")
        assert await window.table("workers") == [
            [stack.workers[0].id, model, "ready", "2 of 2", "", "none", "simulated"]
        ]
        await expect(window.page.locator("#workers .sparkline")).to_have_attribute(
            "aria-label", re.compile(r"^2 busy, at most 2 in the last \d+ s$")
        )
        await leave(*sent)
        await holds(stack, 0)
        await window.shows("#total_cancelled", "6")
        for answer in await asyncio.gather(*load(stack, 5, "[[tokens=2]]"), stack.chat("[[fail]]")):
            assert answer.status_code in (200, 500)
        await window.shows("#total_processed", "5")
        await window.shows("#total_failed", "1")
        await expect(window.page.locator("#requests .state-failed")).to_have_count(1)
        await expect(window.page.locator("#requests .state-completed")).to_have_count(5)
        await same_numbers(window, stack)
        await same_requests(window, stack)
        assert window.complaints == []


async def test_a_page_opened_later_shows_why_a_request_failed(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack:
        await stack.chat("[[tokens=1]]")
        request_id = (await stack.chat("[[fail]]")).headers["x-request-id"]
        async with windows.open(stack) as window:
            await window.live()
            await same_requests(window, stack)
            state = await stack.state(request_id)
            assert state is not None
            assert state.error
            assert state.fault == f"attempt 3 on worker {stack.workers[0].id}: the simulated engine was ordered to fail"
            failed = window.page.locator("#requests tr", has=window.page.locator(".state-failed"))
            assert (await failed.locator("td.error").inner_text()).split("\n") == [state.error, state.fault]
            assert await failed.locator("td.attempt").inner_text() == "3"

            await window.page.get_by_label("Id", exact=True).fill(request_id)
            await window.page.keyboard.press("Enter")
            await window.page.locator("#look-result dl").wait_for()
            names = await window.page.locator("#look-result dt").all_inner_texts()
            found = dict(zip(names, await window.page.locator("#look-result dd").all_inner_texts(), strict=True))
            assert found | {"status": "failed", "error": state.error, "fault": state.fault, "attempt": "3"} == found
            assert found["worker"] == stack.workers[0].id
            assert "queued at" in found
            await window.page.get_by_label("Id", exact=True).fill("of-nobody")
            await window.page.keyboard.press("Enter")
            await window.shows("#look-result", re.compile("refused.*api's log.*REQUEST_STATE_TTL"))

            # Handed over, it waits again, since it was queued.
            now = time.time()
            given_back = state.model_copy(
                update={"id": "again", "status": RequestStatus.QUEUED, "queued_at": now - 3, "started_at": now - 2}
            )
            await stack.states.write(given_back, 0)
            row = window.page.locator("#requests tr", has=window.page.locator(".state-queued"))
            await expect(row.locator("td.waited")).to_have_text(re.compile(r"^[3-9]\.\d\d s$"))
            await expect(row.locator("td.ran")).to_have_text("")


async def test_a_request_is_looked_up_and_cancelled(nats_server: NatsServer, windows: Windows) -> None:
    """By keyboard, and the focus stays where it was or goes to what took its place."""
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        keyboard = window.page.keyboard
        sent = load(stack, 2, FOR_EVER)
        running_id, waiting_id = await newest_id(window, "processing"), await newest_id(window, "queued")
        await window.page.get_by_role("button", name=f"Cancel {waiting_id}").focus()
        await keyboard.press("Enter")
        await stack.reaches(waiting_id, RequestStatus.CANCELLED)
        await window.shows("#message", f"{waiting_id} was cancelled")
        row = window.page.locator("#requests tr", has=window.page.get_by_text(waiting_id))
        await expect(row).to_be_focused()
        # Once more cancels nothing.
        await keyboard.press("Enter")
        state = await stack.state(running_id)
        assert state is not None
        assert state.status is RequestStatus.PROCESSING

        await window.page.get_by_label("Id", exact=True).fill(running_id)
        await keyboard.press("Enter")
        await window.page.locator("#look-result .state-processing").wait_for()
        await window.page.get_by_role("button", name="Cancel it").focus()
        await keyboard.press("Enter")
        await stack.reaches(running_id, RequestStatus.CANCELLED)
        await window.page.locator("#look-result .state-cancelled").wait_for()
        await window.focused("#look-result")
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {499}
        await expect(window.page.locator("#requests .state-processing, #requests .state-queued")).to_have_count(0)
        assert window.complaints == []


async def test_rows_hold_still_under_the_pointer_and_the_focus(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        sent = load(stack, 3, FOR_EVER)
        page, shown = window.page, window.page.locator("#requests td.id")
        await expect(shown).to_have_count(3)
        ids = await shown.all_inner_texts()
        button = page.get_by_role("button", name=f"Cancel {ids[1]}")

        await button.hover()
        place = await button.bounding_box()
        sent += load(stack, 2, FOR_EVER)
        await window.shows("#new", re.compile("^2 new"))
        # In its place it changes all the same.
        await page.mouse.down()
        await page.mouse.up()
        await expect(page.locator("#requests .state-cancelled")).to_have_count(1)
        assert await shown.all_inner_texts() == ids
        other = page.get_by_role("button", name=f"Cancel {ids[0]}")
        assert place is not None
        await page.mouse.move(0, 0)
        await expect(shown).to_have_count(5)
        await window.shows("#new", "")

        await other.focus()
        await page.keyboard.press("Shift")  # who uses the keyboard
        sent += load(stack, 1, FOR_EVER)
        await window.shows("#new", re.compile("^1 new"))
        await expect(other).to_be_focused()
        await page.get_by_label("Id", exact=True).focus()
        await expect(shown).to_have_count(6)
        assert (await shown.all_inner_texts())[-3:] == ids
        await leave(*sent)
        assert window.complaints == []


async def test_it_recovers_after_the_api_was_killed(nats_server: NatsServer, windows: Windows) -> None:
    """What changed meanwhile, of more requests than a message holds, is shown as it is."""
    port = port_of(windows)
    async with running(nats_server, apis=0, max_concurrent_requests=64) as stack:
        first = await stack.api(api_port=port)
        await stack.api()
        async with windows.open(stack) as window:
            await window.live()
            sent = [asyncio.create_task(stack.chat("[[tokens=100 delay_ms=50]]", api=1)) for _ in range(60)]
            await expect(window.page.locator("#requests .state-processing")).to_have_count(50)
            await first.kill()
            await window.shows("#connection", re.compile("^no connection to the api"))
            assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}
            await holds(stack, 0)
            await stack.api(api_port=port)
            await window.live()
            await expect(window.page.locator("#requests .state-completed")).to_have_count(50)
            await expect(window.page.locator("#requests tr")).to_have_count(50)
            await same_requests(window, stack)
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
        await window.shows("#connection", "no event for 10 s, reconnecting")
        stack.apis[0].signal(signal.SIGCONT)
        await window.live()


async def test_nats_away_is_told_apart_from_the_api_away(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await asyncio.to_thread(nats_server.stop)
        await window.shows("#connection", "NATS cannot be reached")
        # A page that is opened now gets no events at all, and says the same.
        await window.page.reload()
        await window.shows("#connection", "NATS cannot be reached")
        await asyncio.to_thread(nats_server.start)
        await window.live()
