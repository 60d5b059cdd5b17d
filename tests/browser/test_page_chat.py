"""The chat of the page."""

import re

from playwright.async_api import expect

from forebay_contracts.wire.heartbeats import WorkerStatus
from support.browser import Windows
from support.nats import NatsServer
from support.page import FOR_EVER, heartbeat, leave, load
from support.stack import running
from support.view import holds


async def test_models_are_shown_and_offered_as_their_workers_come(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0) as stack, windows.open(stack) as window:
        await window.to("models")
        state = window.page.locator("#models .badge").first
        await expect(state).to_have_text("no worker")
        await expect(state).to_have_class("badge bad")
        await expect(window.page.locator("#chat-model option")).to_have_count(1)
        (model,) = await window.page.locator("#chat-model option").all_inner_texts()
        await heartbeat(stack, "slow", model, WorkerStatus.LOADING)
        await expect(state).to_have_text("1 loading")
        await expect(state).to_have_class("badge warn")
        await heartbeat(stack, "other", "another/model", WorkerStatus.READY, "red", "blue")
        offered = window.page.locator("#chat-model option")
        await expect(offered).to_have_text([model, *(f"another/model{adapter}" for adapter in ("", ":red", ":blue"))])
        await heartbeat(stack, "third", "another/model", WorkerStatus.LOADING, "blue")
        await expect(offered).to_have_text([model, "another/model", "another/model:blue"])
        assert await window.page.locator("#chat-model").input_value() == model
        assert window.complaints == []


async def test_a_chat_by_keyboard_alone(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await window.to("chat")
        await expect(window.page.locator("#chat-model option")).to_have_count(1)
        ahead = load(stack, 2, FOR_EVER)
        await holds(stack, 2)
        keyboard = window.page.keyboard
        await window.page.locator("#chat-log").focus()
        await keyboard.press("Tab")
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
        await window.page.get_by_role("link", name="Usage").focus()
        await window.shows("#chat-status", re.compile("20 pieces"))
        await expect(window.page.get_by_role("link", name="Usage")).to_be_focused()
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
        await window.page.get_by_label("Message").fill("[[say]]<think>Hm.</think>Yes.")
        await keyboard.press("Enter")
        await window.shows("#chat-log .assistant:last-child", "Yes.")
        await window.shows("#chat-log .reasoning", "Hm.")
        assert window.complaints == []


async def test_an_error_while_it_waits_is_told(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, workers=0, request_timeout=1) as stack, windows.open(stack) as window:
        await window.shows("#connection", "no worker is ready")
        await window.to("chat")
        await window.page.get_by_label("Message").fill("hello")
        await window.page.keyboard.press("Enter")
        await window.shows("#chat-log .failure", "the request was not finished within 1 seconds")


async def test_a_chat_survives_a_reload_and_a_restart_of_the_api(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        await window.to("chat")
        await expect(window.page.locator("#chat-model option")).to_have_count(1)
        say = window.page.get_by_label("Message")
        await say.fill("[[say]]Hello.")
        await say.press("Enter")
        await window.shows("#chat-log .assistant", "Hello.")
        await say.fill("[[tokens=60 delay_ms=100]]")
        await say.press("Enter")
        answer = "#chat-log .assistant:last-child"
        await window.shows(answer, re.compile("^t0 t1 t2"))
        await window.page.reload()
        await window.shows("#chat-log .assistant >> nth=0", "Hello.")
        await window.shows(answer, re.compile("^t0 t1 t2"))
        port = stack.apis[0].port
        await stack.apis[0].kill()
        await stack.api(api_port=port)
        await window.shows(answer, " ".join(f"t{number}" for number in range(60)))
        assert (await stack.status(api=1))["total_queued"] == 2
