"""Who may see what on the page, and what is only text there."""

import re
import time
from pathlib import Path

from playwright.async_api import expect

from forebay_contracts import keys
from forebay_contracts.wire.heartbeats import WorkerStatus
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.browser import Windows
from support.nats import NatsServer
from support.page import HOSTILE, heartbeat, ids
from support.stack import running

NO_NUMBER = "\N{EN DASH}"
ALICE, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "ops"))


async def test_it_works_with_an_api_key(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, api_keys="first,second") as stack, windows.open(stack) as window:
        refused = await stack.http.get(window.url + "v1/queue/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        await window.shows("#connection", "an API key is needed")
        # A wrong one is told of where it is typed.
        assert await window.page.inner_text("#key-error") == ""
        await window.page.get_by_label("API key").fill("wrong")
        await window.page.keyboard.press("Enter")
        await window.shows("#key-error", "Incorrect API key provided.")
        await window.focused("#key")
        await expect(window.page.get_by_label("API key")).to_have_accessible_description("Incorrect API key provided.")
        await window.page.get_by_label("API key").fill("second")
        await window.page.keyboard.press("Enter")
        await window.live()
        assert await window.page.evaluate("sessionStorage.getItem('forebay-api-key')") == "second"
        await window.shows("#key-name", "key-2")
        await window.to("chat")
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
            if await window.page.get_by_role("button", name="Change").is_visible():
                await window.page.get_by_role("button", name="Change").click()
            await window.page.get_by_label("API key").fill(key)
            await window.page.keyboard.press("Enter")

        async def empty() -> None:
            assert await ids(window) == []
            for element in ("#chat-log", "#request", "#models", "#running", "#usage", "#batches"):
                await window.shows(element, "")
            await window.shows("#queue_size", NO_NUMBER)

        hers, others = await ask(ALICE, "[[fail]]"), await ask(OPS, "[[fail]]")
        await use(ALICE)
        await window.live()
        await window.shows("#key-name", "alice (own requests only)")
        await window.to("models")
        await expect(window.page.locator("#models .model")).to_have_count(1)
        # Who may not steer is not asked to, and what went wrong inside is the operator's alone.
        await expect(window.page.locator("#models .steer:visible")).to_have_count(0)
        await window.to("requests")
        await expect(window.page.locator("#requests tr")).to_have_count(1)
        assert await ids(window) == [hers]
        state = await stack.state(hers)
        assert state is not None
        assert await window.page.locator("td.error").inner_text() == state.error
        await window.to("chat")
        await window.page.get_by_label("Message").fill("[[tokens=2]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .assistant", "t0 t1")
        await window.to(f"request/{hers}")
        await window.page.locator("#request strong.state-failed").wait_for()

        await use("not-a-key")
        await window.shows("#connection", "an API key is needed")
        await empty()

        await use(OPS)
        await window.live()
        await window.to("requests")
        await expect(window.page.locator("#requests tr")).to_have_count(3)
        assert {hers, others} < set(await ids(window))
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
        await window.to("models")
        await expect(window.page.locator("#models h3", has_text=HOSTILE)).to_have_count(1)
        await window.to("")
        await window.shows("#attention .bad", re.compile(re.escape(f"{HOSTILE} failed on {HOSTILE}: {HOSTILE}")))
        await window.to("requests")
        await expect(window.page.locator("#requests tr")).to_have_count(1)
        (row,) = await window.table("requests")
        assert row[3:7] == [HOSTILE, HOSTILE, "", HOSTILE]
        assert row[11] == f"{HOSTILE}\n{HOSTILE}"
        await window.to("request/hostile")
        await expect(window.page.locator("#request")).to_have_text(re.compile(f"{re.escape(HOSTILE)}.*" * 4))
        await window.to("chat")
        await window.page.get_by_label("Message").fill(f"[[{HOSTILE}]]")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .user", f"[[{HOSTILE}]]")
        await window.shows("#chat-log .failure", re.compile("does not know the order '<img'"))
        # It can be chosen, as any model can.
        await heartbeat(stack, "hostile", HOSTILE, WorkerStatus.READY)
        await expect(window.page.locator("#chat-model option")).to_have_count(2)
        assert await window.page.locator("img").count() == 0
        assert await window.page.title() == "Chat · Forebay"
        assert window.complaints == []
