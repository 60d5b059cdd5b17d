"""How the page looks: it can be read, and its pictures in the docs are made here."""

import asyncio
import os
import re
from pathlib import Path

import pytest
from playwright.async_api import expect

from support.browser import Windows
from support.nats import NatsServer
from support.page import FOR_EVER, leave, load, newest_id
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
        early = load(stack, 7, "[[tokens=10 delay_ms=400]]")
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
