"""The page in Debian's Chromium, driven by Playwright."""

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.async_api import CDPSession, ConsoleMessage, Page, Request, async_playwright, expect

from support.stack import Stack

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 30_000

expect.set_options(timeout=WAIT_MS)


@dataclass
class Window:
    """A page, with what it asked for and complained of."""

    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    async def number(self, name: str) -> int:
        """The number that stands in a tile."""
        return int(await self.page.inner_text(f"#{name}"))

    async def shows(self, element: str, text: str | re.Pattern[str]) -> None:
        """Wait until an element, named by a CSS selector, holds this text."""
        await expect(self.page.locator(element)).to_have_text(text, timeout=WAIT_MS)

    async def table(self, body: str) -> list[list[str]]:
        """The texts of a table's cells, row by row."""
        rows: list[list[str]] = await self.page.evaluate(
            "id => [...document.getElementById(id).rows].map(row => [...row.cells].map(cell => cell.innerText.trim()))",
            body,
        )
        return rows

    async def focused(self, selector: str) -> None:
        """Wait until the focus is on this element."""
        await expect(self.page.locator(selector)).to_be_focused(timeout=WAIT_MS)

    async def to(self, view: str) -> None:
        """Go to the view with this address, such as `requests?q=state:failed`."""
        await self.page.goto(f"{self.url}#/{view}")

    async def answer(self, button: str) -> None:
        """Answer the question that the page asks."""
        await self.page.locator("#ask").get_by_role("button", name=button).click()

    async def live(self) -> None:
        """Wait until the page says that it is fed."""
        await self.shows("#connection", "live")

    def elsewhere(self) -> list[str]:
        """What was asked for from any other place than the api."""
        return [url for url in self.asked if not url.startswith(self.url)]


class Windows:
    """Opens the page of a stack, each time with nothing remembered."""

    def __init__(self, chromium: str, folder: Path) -> None:
        self._chromium = chromium
        self._folder = folder
        self._opened = 0

    @contextlib.asynccontextmanager
    async def open(self, stack: Stack, scheme: str = "light") -> AsyncIterator[Window]:
        """The page at `/` of the stack's first api."""
        self._opened += 1
        async with async_playwright() as playwright:
            context = await playwright.chromium.launch_persistent_context(
                str(self._folder / f"profile-{self._opened}"),
                executable_path=self._chromium,
                args=ARGUMENTS,
                color_scheme="dark" if scheme == "dark" else "light",
                viewport={"width": 1280, "height": 900},
            )
            try:
                window = Window(context.pages[0], stack.apis[0].url + "/")

                def complained(message: ConsoleMessage) -> None:
                    if message.type in ("error", "warning"):
                        window.complaints.append(f"{message.text} {message.location.get('url', '')}".strip())

                def asked(request: Request) -> None:
                    window.asked.append(request.url)

                window.page.on("console", complained)
                window.page.on("pageerror", lambda error: window.complaints.append(str(error)))
                window.page.on("request", asked)
                await window.page.goto(window.url)
                yield window
            finally:
                await context.close()


async def busy_s(session: CDPSession) -> float:
    """How long the page has worked since `Performance.enable`: scripts, styles and layout."""
    metrics = (await session.send("Performance.getMetrics"))["metrics"]
    work = ("ScriptDuration", "RecalcStyleDuration", "LayoutDuration")
    return sum(float(one["value"]) for one in metrics if one["name"] in work)
