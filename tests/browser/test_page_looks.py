"""How the page looks: it can be read and used at every size, and its pictures in the docs are made here."""

import asyncio
import itertools
import os
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import expect

from forebay_contracts.wire.state import RequestStatus
from support.browser import Window, Windows, busy_s
from support.nats import NatsServer
from support.page import FOR_EVER, leave, load, past, remember
from support.stack import running

IMAGES = Path(__file__).parents[2] / "docs" / "images"
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


VIEWS = ("", "requests", "models", "batches", "usage", "chat")
ALL = list(itertools.product((1440, 768, 390), ("light", "dark"), (0, 10, 5_000)))
CHOSEN = ALL if os.environ.get("ALL_LOOKS") else [(1440, "light", 0), (768, "dark", 10), (390, "light", 5_000)]
PAGE = 50
MAX_CHANGE_MS = 100


async def can_be_used(window: Window, width: int, view: str) -> None:
    """Hold a view against axe, WCAG 2.2's contrasts of text (4.5) and of controls (3), and the width of the window."""
    await window.to(view)
    await expect(window.page.locator("main > div:visible")).to_have_count(1)
    assert await window.page.evaluate("document.documentElement.scrollWidth") <= width, view
    found = await Axe().run(window.page)
    assert found.violations_count == 0, found.generate_report()
    assert await window.page.evaluate(CONTRASTS) == [], view


@pytest.mark.parametrize(("width", "scheme", "known"), CHOSEN)
async def test_each_action_in_each_look(
    nats_server: NatsServer, windows: Windows, width: int, scheme: str, known: int
) -> None:
    async with running(nats_server, max_concurrent_requests=2) as stack:
        ended = itertools.cycle((RequestStatus.COMPLETED, RequestStatus.FAILED, RequestStatus.CANCELLED))
        others = ({"status": next(ended), "error": "it broke", "key": f"team-{number % 7}"} for number in range(known))
        await remember(stack, (past(number, **fields) for number, fields in enumerate(others, start=100)))
        async with windows.open(stack, scheme) as window:
            page = window.page
            await page.set_viewport_size({"width": width, "height": 844})
            await window.live()
            for view in VIEWS:
                await can_be_used(window, width, view)
            sent = load(stack, 5, FOR_EVER)
            await window.to("requests?q=state:queued,processing&order=oldest")
            rows = page.locator("#requests tr")
            await expect(rows).to_have_count(5)
            await can_be_used(window, width, "requests?q=state:queued,processing")
            # Cancelled: one by its button, one on its own page, the others together.
            await rows.first.get_by_role("button", name="Cancel").click()
            await page.mouse.move(0, 0)
            await expect(rows).to_have_count(4)
            await rows.first.get_by_role("link").click()
            await page.locator("#request").get_by_role("button", name="Cancel").click()
            await expect(page.locator("#request strong")).to_have_text("cancelled")
            await can_be_used(window, width, page.url.partition("#/")[2])
            await window.to("requests?q=state:queued,processing")
            await page.get_by_label("all on this page").check()
            await page.get_by_role("button", name="Cancel 3", exact=True).click()
            assert (await Axe().run(page)).violations_count == 0
            await window.answer("Cancel 3")
            await window.shows("#requests-none", "No request fits this filter.")
            await asyncio.gather(*sent)
            await page.get_by_label("Filter").fill("")
            await page.get_by_role("button", name="Show").click()
            await window.shows("#range", f"1 to {min(known + 5, 50)} of {known + 5:,}")
            if known > PAGE:
                await page.get_by_role("link", name="next").click()
                await window.shows("#range", f"51 to 100 of {known + 5:,}")
            await window.to("models")
            await page.get_by_role("button", name="Pause").click()
            await window.answer("Pause")
            await page.get_by_role("button", name="Resume").click()
            await expect(page.locator("#models .badge")).to_have_text("1 ready")
            await window.to("chat")
            await page.get_by_label("Message").fill("[[tokens=3]]")
            await page.get_by_role("button", name="Send").click()
            await window.shows("#chat-log .assistant", "t0 t1 t2")
            await page.get_by_role("button", name="Light or dark").click()
            await can_be_used(window, width, "chat")

            # What a change costs the page.
            await window.to("requests")
            await expect(rows).to_have_count(min(known + 6, 50))
            session = await page.context.new_cdp_session(page)
            await session.send("Performance.enable")
            before = await busy_s(session)
            for number in range(3):
                await stack.states.write(newest := past(-number, id=f"new-{number}"), 0)
                await expect(page.locator(f"#requests tr[data-id={newest.id}]")).to_be_visible()
            assert (await busy_s(session) - before) / 3 * 1000 < MAX_CHANGE_MS
            assert window.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"] if os.environ.get("UPDATE_SCREENSHOTS") else ["dark"])
async def test_screenshots_for_the_docs(nats_server: NatsServer, windows: Windows, scheme: str, tmp_path: Path) -> None:
    """Under load, with each end that a request can have; into docs/images where UPDATE_SCREENSHOTS is set."""
    async with (
        running(nats_server, max_concurrent_requests=4, worker_slots=2, workers=2) as stack,
        windows.open(stack, scheme) as window,
    ):
        await window.page.set_viewport_size({"width": 1440, "height": 900})
        await stack.worker(model_name="Qwen/Qwen3-4B", default_model="Qwen/Qwen3-4B")
        await window.live()
        failed = (await stack.chat("[[tokens=3 fail]]")).headers["x-request-id"]
        early = load(stack, 7, "[[tokens=10 delay_ms=300]]")
        await window.shows("#queue_size", "3")
        await asyncio.gather(*early)
        await window.shows("#queue_size", "0")
        late = load(stack, 6, "[[tokens=40 delay_ms=200]]")
        await window.shows("#queue_size", "2")
        await expect(window.page.locator("#running tr")).to_have_count(4)
        await expect(window.page.locator("#attention .bad")).to_have_count(1)
        folder = IMAGES if os.environ.get("UPDATE_SCREENSHOTS") else tmp_path
        views = {"page": ""} | ({"request": f"request/{failed}"} if scheme == "light" else {})
        for name, view in views.items():
            await window.to(view)
            await window.page.locator("#attention .bad:visible, .timeline li:visible").first.wait_for()
            image = await window.page.screenshot(path=folder / f"{name}-{scheme}.png", animations="disabled")
            assert 20_000 < len(image) < 800_000
        ground = await window.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(245, 247, 249)", "dark": "rgb(16, 23, 29)"}[scheme]
        await leave(*late)
        assert window.complaints == []
