"""The requests on the page: found, opened, cancelled and run again."""

import asyncio
import re
import time

from playwright.async_api import Route, expect

from forebay_contracts.wire.state import PastAttempt, RequestStatus
from support.browser import Windows
from support.nats import NatsServer
from support.page import FOR_EVER, ids, leave, load, newest_id, past, remember
from support.stack import MODEL, running


async def test_requests_are_found_by_what_they_are(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0) as stack:
        await remember(stack, (past(number, model="org/Qwen", key="team-a") for number in range(100, 220)))
        failed = [past(number, status=RequestStatus.FAILED, error="it broke", worker="gpu-2") for number in (20, 30)]
        await remember(stack, [*failed, past(90, status=RequestStatus.QUEUED, tier="flex", started_at=None)])
        async with windows.open(stack) as window:
            page = window.page
            await window.to("requests")
            await window.shows("#range", "1 to 50 of 123")
            await page.get_by_role("link", name="next").click()
            await window.shows("#range", "51 to 100 of 123")
            assert page.url.endswith("#/requests?page=2")
            await page.get_by_role("button", name="failed 2").click()
            await window.shows("#range", "1 to 2 of 2")
            assert await page.locator("#filter").input_value() == "state:failed"
            await expect(page.get_by_role("button", name="failed 2")).to_have_attribute("aria-pressed", "true")
            assert await ids(window) == [one.id for one in failed]
            await page.get_by_role("button", name="queued 1").click()
            await window.shows("#range", "1 to 3 of 3")
            assert page.url.endswith("#/requests?q=state%3Afailed%2Cqueued")
            for line, count in (
                ("model:qwen key:team-a older:95s", "1 to 50 of 120"),
                ("worker:gpu-2 BROKE", "1 to 2 of 2"),
                ("tier:flex", "1 to 1 of 1"),
                ("state:waiting", "1 to 1 of 1"),
            ):
                await page.get_by_label("Filter").fill(line)
                await page.keyboard.press("Enter")
                await window.shows("#range", count)
            for line, told in (("older:soon", "duration"), ("state:lost", "one of queued"), ("model:", "no value")):
                await page.get_by_label("Filter").fill(line)
                await page.keyboard.press("Enter")
                await window.shows("#filter-error", re.compile(told))
            # The address is the view: a reload, or another's browser, shows the same.
            await window.to("requests?q=state:failed&order=oldest")
            await page.reload()
            await window.shows("#range", "1 to 2 of 2")
            assert await ids(window) == [failed[1].id, failed[0].id]
            # A whole id leads to its request.
            await page.get_by_label("Filter").fill(failed[0].id)
            await page.keyboard.press("Enter")
            await window.shows("#request-title", f"Request {failed[0].id}")
            await page.go_back()
            await window.shows("#range", "1 to 2 of 2")
            # No address stops the page.
            for address in ("toString", "request/%"):
                await window.to(address)
                await page.reload()
                await window.to("requests?q=state:failed")
                await window.shows("#range", "1 to 2 of 2")
            # All that fit are cancelled on every page of the list, up to a bound; here it is smaller than on the page.
            source = (await stack.http.get(window.url + "page/requests.js")).text
            assert "MOST = 1000;" in source
            smaller = source.replace("MOST = 1000;", "MOST = 55;")
            await page.route(
                "**/page/requests.js", lambda route: route.fulfill(body=smaller, content_type="text/javascript")
            )
            many = [past(1000 + number, status=RequestStatus.QUEUED, model="org/Many") for number in range(60)]
            await remember(stack, many)
            await window.to("requests?q=model:org/many&order=oldest")
            await page.reload()
            await page.get_by_role("button", name="Cancel all 60 that fit").press("Enter")
            await window.shows("#ask-text", re.compile("^60 fit, and at most 55 .*: the first in this order"))
            await window.answer("Cancel 55")
            await window.shows("#message", "55 requests were cancelled; 5 that fit are left")
            await stack.reaches(many[-1].id, RequestStatus.CANCELLED)  # it was queued first
            await page.get_by_role("button", name="Cancel all 5 that fit").press("Enter")
            await window.answer("Cancel 5")
            await window.focused("#select-all")  # the button is gone: nothing is left to cancel
            assert not [line for line in window.complaints if "404" not in line]


async def test_a_request_tells_what_happened_to_it(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        worker = stack.workers[0].id
        request_id = (await stack.chat("[[tokens=2 fail]]")).headers["x-request-id"]
        await window.to(f"request/{request_id}")
        steps = window.page.locator(".timeline li span:last-child")
        cause = "the simulated engine was ordered to fail"
        await expect(steps).to_have_text(
            [
                "queued",
                *(f"attempt 1 on {worker}", f"failed after 2 tokens: {cause}"),
                *(f"attempt 2 on {worker}", f"failed after 2 tokens: {cause}"),
                *(f"attempt 3 on {worker}", re.compile("^first token, .* s after it was queued")),
                f"failed: {cause}",
                "failed: the generation failed (what the client was told)",
            ]
        )
        await expect(window.page.locator("#request strong")).to_have_text("failed")
        await expect(window.page.locator("#request code")).to_have_text(f"forebay requests --id {request_id}")

        # One that another worker takes over; it is shown as it goes on.
        lost = "attempt 1 on worker gpu-1: it was lost"
        before = PastAttempt(number=1, worker="gpu-1", began_at=time.time() - 9, fault=lost)
        state = past(
            10,
            status=RequestStatus.PROCESSING,
            attempts=(before,),
            attempt=2,
            worker="gpu-2",
            finished_at=None,
            fault=lost,
        )
        await stack.states.write(state, 0)
        await window.to(f"request/{state.id}")
        await expect(steps).to_have_text(
            ["queued", "attempt 1 on gpu-1", "failed: it was lost", "attempt 2 on gpu-2", "is running"]
        )
        stored = await stack.states.get(state.id)
        assert stored is not None
        ended = {"status": RequestStatus.COMPLETED, "finished_at": time.time(), "resumed": 7}
        await stack.states.write(state.model_copy(update=ended), stored.revision)
        await expect(steps.nth(3)).to_have_text("attempt 2 on gpu-2, from token 7 on")
        await expect(steps.nth(4)).to_have_text("completed")

        # The answer so far of a stored one.
        body = {"model": MODEL, "input": "[[tokens=300 delay_ms=50]]", "background": True}
        created = (await stack.http.post(window.url + "v1/responses", json=body)).json()
        await window.to(f"request/{created['id']}")
        await window.page.get_by_text("The answer so far").click()
        await expect(window.page.locator("details pre")).to_have_text(re.compile("^t0 t1 t2"))
        await window.page.get_by_role("button", name="Cancel").click()
        await expect(window.page.locator("#request strong")).to_have_text("cancelled")
        await expect(window.page.locator("details pre")).to_be_visible()

        await window.to("request/of-nobody")
        await window.shows("#request", re.compile("refused.*api's log.*REQUEST_STATE_TTL"))
        assert all("404" in told for told in window.complaints)


async def test_requests_are_cancelled_and_run_again_by_keyboard(nats_server: NatsServer, windows: Windows) -> None:
    """The table is one tab stop, and the focus stays where it was."""
    async with running(nats_server, max_deliveries=1) as stack, windows.open(stack) as window:
        page, keyboard = window.page, window.page.keyboard
        await window.to("requests")
        # The newest stands first: where nobody has been in the table, Tab leads there, and not to what was first once.
        sent = load(stack, 1, FOR_EVER)
        rows = page.locator("#requests tr")
        await expect(rows).to_have_count(1)
        sent += load(stack, 3, FOR_EVER)
        await expect(rows).to_have_count(4)
        await expect(page.locator("#requests .state-processing")).to_have_count(1)
        await page.locator("#select-all").focus()
        await keyboard.press("Tab")
        await expect(rows.first).to_be_focused()
        await keyboard.press("ArrowDown")
        await expect(rows.nth(1)).to_be_focused()
        shown = await ids(window)
        await keyboard.press("Delete")
        await stack.reaches(shown[1], RequestStatus.CANCELLED)
        await window.shows("#message", f"{shown[1]} was cancelled")
        await expect(rows.nth(1)).to_be_focused()
        # Once more cancels nothing, and the next Tab leaves the table.
        await keyboard.press("Delete")
        await keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.closest('#requests')") is None
        await keyboard.press("Shift+Tab")
        await expect(rows.nth(1)).to_be_focused()
        for key in ("Home", "Space", "ArrowDown", "ArrowDown", "Space"):
            await keyboard.press(key)
        await window.shows("#selected", "2 selected")
        await page.locator("#cancel-selected").press("Enter")
        await window.answer("Cancel 2")
        await window.shows("#message", "2 requests were cancelled")
        for one in (shown[0], shown[2]):
            await stack.reaches(one, RequestStatus.CANCELLED)
        await rows.nth(3).focus()
        await keyboard.press("Enter")
        await window.shows("#request-title", f"Request {shown[3]}")
        await page.get_by_role("button", name="Cancel").press("Enter")
        await stack.reaches(shown[3], RequestStatus.CANCELLED)
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {499}

        # Stored requests that failed run again, all of the page at once.
        body = {"model": MODEL, "input": "[[fail]]", "background": True}
        for _ in range(2):
            await stack.http.post(window.url + "v1/responses", json=body)
        await window.to("requests?q=state:failed")
        await expect(page.get_by_role("button", name="Run", exact=False)).to_have_count(3)
        await page.locator("#select-all").check()
        await page.get_by_role("button", name="Run 2 again").click()
        await window.shows("#message", "2 requests run again")
        await expect(rows).to_have_count(4)
        assert window.complaints == []


async def test_a_request_is_cancelled_after_its_view_was_left(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        sent = load(stack, 1, FOR_EVER)
        await window.to("requests")
        await window.page.locator("#requests tr a").click()
        slow = asyncio.Event()

        async def held(route: Route) -> None:
            if route.request.method == "DELETE":
                await slow.wait()
            await route.continue_()

        await window.page.route("**/v1/queue/request/*", held)
        async with window.page.expect_request(lambda request: request.method == "DELETE"):
            await window.page.get_by_role("button", name="Cancel").click()
        await window.to("batches")
        slow.set()
        await window.shows("#message", re.compile("was cancelled$"))
        assert (await sent[0]).status_code == 499
        # Once the view looked again at a request that it no longer knew.
        async with window.page.expect_request("**/health/live"):
            await window.page.evaluate("new Promise(resolve => setTimeout(resolve)).then(() => fetch('/health/live'))")
        assert not [url for url in window.asked if url.endswith("/null")]
        assert window.complaints == []


async def test_rows_hold_still_under_the_pointer_and_the_focus(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        page, rows = window.page, window.page.locator("#requests tr")
        await window.to("requests?q=state:queued,processing")
        sent = load(stack, 3, FOR_EVER)
        await expect(rows).to_have_count(3)
        first = await ids(window)

        await page.get_by_role("button", name=f"Cancel {first[1]}").hover()
        sent += load(stack, 2, FOR_EVER)
        await window.shows("#new", re.compile("^2 new"))
        # It is cancelled in its place, where it no longer fits the filter.
        await page.mouse.down()
        await page.mouse.up()
        await expect(page.locator("#requests .gone")).to_have_count(1)
        assert await ids(window) == first
        await page.mouse.move(0, 0)
        await expect(rows).to_have_count(4)
        await window.shows("#new", "")

        row = page.locator(f"#requests tr[data-id='{first[0]}']")
        await row.focus()
        await page.keyboard.press("Shift")  # who uses the keyboard
        sent += load(stack, 1, FOR_EVER)
        await window.shows("#new", re.compile("^1 new"))
        await expect(row).to_be_focused()
        await page.get_by_label("Filter").focus()
        await expect(rows).to_have_count(5)
        assert await newest_id(window, "queued") not in first
        await leave(*sent)
        assert window.complaints == []
