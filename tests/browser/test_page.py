import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from forebay_contracts import keys
from forebay_contracts.messages import RequestState, RequestStatus, WorkerInfo, WorkerStatus
from support.browser import Window, Windows
from support.nats import NatsServer
from support.ports import port_of
from support.stack import Stack, running
from support.view import holds

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TILES = ("queue_size", "processing_count", "active_requests", "max_concurrent", "max_queue_size", "total_queued")
TOTALS = ("total_processed", "total_failed", "total_timed_out", "total_cancelled")
FOR_EVER = "[[tokens=2000 delay_ms=500]]"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
NO_NUMBER = "\N{EN DASH}"
ALICE, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "ops"))


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


def load(stack: Stack, count: int, text: str) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(stack.chat(text)) for _ in range(count)]


async def leave(*sent: asyncio.Task[Any]) -> None:
    """The clients of these requests go away."""
    for task in sent:
        task.cancel()
    await asyncio.gather(*sent, return_exceptions=True)


async def heartbeat(stack: Stack, worker: str, model: str, status: WorkerStatus) -> None:
    """Let the api hear of a worker."""
    now = time.time()
    info = WorkerInfo(
        id=worker, version="1", started_at=now, heartbeat_at=now, model=model, status=status, slots=1, engine=HOSTILE
    )
    await (await stack.connection.jetstream.key_value("inference-workers")).put(worker, info.encode())


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
            await window.shows("#look-result", re.compile("never admitted.*api's log.*REQUEST_STATE_TTL"))

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
        await window.shows("#message", f"{waiting_id} is cancelled")
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
        await window.shows("#connection", "nothing heard for 10 s, connecting again")
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


async def test_each_key_sees_its_own_and_leaves_nothing_behind(
    nats_server: NatsServer, windows: Windows, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    alice, ops = (
        keys.written(name, key, max_requests=None, operator=name == "ops")
        for name, key in (("alice", ALICE), ("ops", OPS))
    )
    file.write_text(alice + ops)
    async with running(nats_server, api_keys_file=file) as stack, windows.open(stack) as window:

        async def ask(key: str, text: str) -> str:
            body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": text}]}
            url, headers = window.url + "v1/chat/completions", {"authorization": f"Bearer {key}"}
            return (await stack.http.post(url, json=body, headers=headers)).headers["x-request-id"]

        async def use(key: str) -> None:
            await window.page.get_by_label("API key").fill(key)
            await window.page.keyboard.press("Enter")

        async def empty() -> None:
            assert await window.table("requests") == []
            for element in ("#chat-log", "#look-result", "#models", "#workers", "#chart"):
                await window.shows(element, "")
            await window.shows("#queue_size", NO_NUMBER)

        hers, others = await ask(ALICE, "[[fail]]"), await ask(OPS, "[[fail]]")
        await use(ALICE)
        await window.live()
        assert [row[0] for row in await window.table("requests")] == [hers]
        # What went wrong inside is the operator's alone.
        state = await stack.state(hers)
        assert state is not None
        assert await window.page.locator("td.error").inner_text() == state.error
        await window.page.get_by_label("Message").fill("[[tokens=2]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .assistant", "t0 t1")
        await window.page.get_by_label("Id", exact=True).fill(hers)
        await window.page.keyboard.press("Enter")
        await window.page.locator("#look-result .state-failed").wait_for()

        await use("not-a-key")
        await window.shows("#connection", "an API key is needed")
        await empty()

        await use(OPS)
        await window.live()
        assert {hers, others} < {row[0] for row in await window.table("requests")}
        # Taken away, what it showed goes with it.
        file.write_text(alice)
        await window.shows("#connection", "an API key is needed")
        await empty()


async def test_text_of_others_stays_text(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        now = time.time()
        hostile = RequestState(
            id="hostile",
            status=RequestStatus.FAILED,
            completion_type=HOSTILE,
            timestamp=now,
            error=HOSTILE,
            fault=HOSTILE,
            model=HOSTILE,
            queued_at=now,
            deadline=now,
            worker=HOSTILE,
        )
        await stack.states.write(hostile, 0)
        await heartbeat(stack, "hostile", HOSTILE, WorkerStatus.READY)
        await expect(window.page.locator("#requests tr")).to_have_count(1)
        (row,) = await window.table("requests")
        assert row[2:5] == [HOSTILE] * 3
        assert row[9] == f"{HOSTILE}\n{HOSTILE}"
        await expect(window.page.locator("#workers tr")).to_have_count(2)
        assert ["hostile", HOSTILE, "ready", "0 of 1", "", "", HOSTILE] in await window.table("workers")
        await window.page.get_by_label("Id", exact=True).fill("hostile")
        await window.page.keyboard.press("Enter")
        await expect(window.page.locator("#look-result dd", has_text=HOSTILE)).to_have_count(5)
        await window.page.get_by_label("Message").fill(f"[[{HOSTILE}]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .user", f"[[{HOSTILE}]]")
        await window.shows("#chat-log .failure", re.compile("does not know the order '<img'"))
        # It can be chosen, as any model can.
        await expect(window.page.locator("#chat-model option")).to_have_count(2)
        assert await window.page.locator("img").count() == 0
        assert await window.page.title() == "Forebay"
        assert window.complaints == []


async def test_models_are_shown_and_offered_as_their_workers_come(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0) as stack, windows.open(stack) as window:
        state = window.page.locator("#models td:last-child span")
        await expect(state).to_have_text("no worker")
        await expect(state).to_have_class("state-failed")
        (model,) = await window.page.locator("#chat-model option").all_inner_texts()
        await heartbeat(stack, "slow", model, WorkerStatus.LOADING)
        await expect(state).to_have_text("1 loading")
        await expect(state).to_have_class("state-loading")
        await heartbeat(stack, "other", "another/model", WorkerStatus.READY)
        await expect(window.page.locator("#chat-model option")).to_have_text([model, "another/model"])
        assert await window.page.locator("#chat-model").input_value() == model
        assert window.complaints == []


async def test_a_chat_by_keyboard_alone(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await expect(window.page.locator("#chat-model option")).to_have_count(1)
        ahead = load(stack, 2, FOR_EVER)
        await holds(stack, 2)
        keyboard = window.page.keyboard
        await keyboard.press("Tab")  # the link that skips to the chat
        await keyboard.press("Enter")
        await keyboard.type("[[tokens=3 delay_ms=20]]")
        await keyboard.press("Enter")
        await window.shows("#chat-status", re.compile("^in the queue: place 2"))
        await leave(*ahead)
        await window.shows("#chat-log .assistant", "t0 t1 t2")
        await window.shows("#chat-status", re.compile(r"^first token after \d+\.\d\d s, 3 pieces"))
        # The focus is back where the next message is written, and Escape stops an answer.
        await window.focused("#chat-message")
        await keyboard.type("[[tokens=2000 delay_ms=50]]")
        await keyboard.press("Enter")
        await window.shows("#chat-log .assistant:last-child", re.compile("t2"))
        await keyboard.press("Escape")
        await window.shows("#chat-status", "stopped")
        await holds(stack, 0)
        # Where the reader has gone elsewhere, the end of an answer does not take the focus away.
        await keyboard.type("[[tokens=20 delay_ms=50]]")
        await keyboard.press("Enter")
        await window.shows("#chat-log .assistant:last-child", re.compile("t2"))
        await window.page.get_by_label("Id", exact=True).focus()
        await window.shows("#chat-status", re.compile("20 pieces"))
        await window.focused("#look-id")
        # Given up for a new one, nothing is left of it.
        await window.page.get_by_label("Message").fill("[[tokens=2000 delay_ms=50]]")
        await keyboard.press("Enter")
        await window.shows("#chat-log .assistant:last-child", re.compile("t2"))
        await window.page.get_by_role("button", name="New").click()
        await expect(window.page.locator("#chat-send")).to_be_enabled()
        assert await window.page.inner_text("#chat-log") == ""
        await window.shows("#chat-status", "")
        await window.page.get_by_label("Message").fill("[[tokens=0]]")
        await keyboard.press("Enter")
        await window.shows("#chat-status", re.compile(r"^an empty answer after \d+\.\d\d s$"))
        assert window.complaints == []


async def test_an_error_while_it_waits_is_told(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0, request_timeout=1) as stack, windows.open(stack) as window:
        await window.shows("#connection", "no worker is ready")
        await window.page.get_by_label("Message").fill("hello")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .failure", "the request was not finished within 1 seconds")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_can_be_read(nats_server: NatsServer, windows: Windows, scheme: str) -> None:
    """Contrast as WCAG 2.2 asks for it: 4.5 for text, 3 for what shows where an input or a button is."""
    async with running(nats_server) as stack, windows.open(stack, scheme) as window:
        await window.live()
        await stack.chat("[[fail]]")
        sent = load(stack, 2, FOR_EVER)
        await expect(window.page.locator("#requests tr")).to_have_count(3)
        assert await window.page.evaluate(CONTRASTS) == []
        await window.page.set_viewport_size({"width": 390, "height": 800})
        assert await window.page.evaluate("document.documentElement.scrollWidth") == 390
        await expect(window.page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "polite")
        await leave(*sent)


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => rgb(text).slice(0, 3)
    .map((value) => value / 255).map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const ground = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return rgb(color)[3] === 0 ? ground(element.parentElement) : color;
  };
  const poor = [];
  const hold = (least, a, b, ...about) => contrast(a, b) < least && poor.push([...about, contrast(a, b), a, b]);
  for (const control of document.querySelectorAll("input, textarea, select, button")) {
    const { borderTopColor } = getComputedStyle(control);
    hold(3, borderTopColor, ground(control), control.outerHTML, "its ground");
    hold(3, borderTopColor, ground(control.parentElement), control.outerHTML, "the ground around it");
    if (!control.placeholder) continue;
    hold(4.5, getComputedStyle(control, "::placeholder").color, ground(control), "placeholder");
  }
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (text && !element.disabled) hold(4.5, getComputedStyle(element).color, ground(element), element.outerHTML);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_screenshots_for_the_docs(nats_server: NatsServer, windows: Windows, scheme: str, tmp_path: Path) -> None:
    """Under load, with each end that a request can have; into docs/images where UPDATE_SCREENSHOTS is set."""
    async with (
        running(nats_server, max_concurrent_requests=4, worker_slots=2, workers=2) as stack,
        windows.open(stack, scheme) as window,
    ):
        await window.page.set_viewport_size({"width": 1440, "height": 900})
        await stack.worker(model_name="Qwen/Qwen3-4B", default_model="Qwen/Qwen3-4B")
        await window.live()
        await window.page.get_by_label("Message").fill("What is a forebay? [[tokens=12 delay_ms=20]]")
        await window.page.keyboard.press("Enter")
        await stack.chat("[[tokens=3 fail]]")
        early = load(stack, 7, "[[tokens=10 delay_ms=150]]")
        await window.shows("#queue_size", "3")
        await window.page.get_by_role("button", name=f"Cancel {await newest_id(window, 'queued')}").click()
        await window.page.mouse.move(0, 0)
        await asyncio.gather(*early)
        late = load(stack, 6, "[[tokens=20 delay_ms=200]]")
        await window.shows("#queue_size", "2")
        await window.page.get_by_label("Id", exact=True).fill(await newest_id(window, "failed"))
        await window.page.keyboard.press("Enter")
        await window.page.locator("#look-result dl").wait_for()
        await window.page.evaluate("document.activeElement.blur()")
        # The heartbeats tell of it too, and the picture has moved a little.
        await expect(window.page.locator("#workers tr", has_text="2 of 2")).to_have_count(2)
        await window.shows("#chart-span", re.compile(r"^the last ([89]|\d\d) s$"))
        folder = IMAGES if os.environ.get("UPDATE_SCREENSHOTS") else tmp_path
        image = await window.page.screenshot(path=folder / f"page-{scheme}.png", animations="disabled", full_page=True)
        assert 20_000 < len(image) < 800_000
        ground = await window.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(245, 247, 249)", "dark": "rgb(16, 23, 29)"}[scheme]
        await leave(*late)
        assert window.complaints == []
