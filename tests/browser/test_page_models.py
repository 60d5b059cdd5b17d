"""Models and workers are steered on the page, with the effect shown; batches and usage."""

import json
import re
from pathlib import Path

from playwright.async_api import expect

from forebay_contracts import keys
from support.browser import Windows
from support.nats import NatsServer
from support.page import FOR_EVER, leave, load
from support.stack import MODEL, running
from support.view import holds

ALICE, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "ops"))


async def test_a_model_is_paused_and_a_worker_drained(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        page, card = window.page, window.page.locator("#models .model")
        model = f"HuggingFaceTB/{MODEL}"
        await window.to("models")
        await page.get_by_role("button", name=f"Pause {model}").click()
        await expect(page.locator("#ask")).to_have_text(re.compile("0 requests that run go on. 0 wait now."))
        await page.keyboard.press("Escape")
        await expect(card.locator(".badge")).to_have_text("1 ready")
        await page.get_by_role("button", name=f"Pause {model}").click()
        await page.get_by_label("For").select_option("1 hour")
        await window.answer("Pause")
        await window.shows("#message", f"{model} is paused for 1 h 0 min; 0 requests that run go on.")
        await expect(card.locator(".badge")).to_have_text(re.compile(r"^paused until \d"))
        sent = load(stack, 2, FOR_EVER)
        await expect(card.locator(".facts")).to_have_text(re.compile("^waiting2running0 of 1"))
        await window.to("")
        await expect(page.locator("#attention .warn")).to_have_text(re.compile(f"{model} is paused; 2 requests wait."))
        await page.locator("#attention a").first.click()
        await page.get_by_role("button", name=f"Resume {model}").click()
        await expect(card.locator(".badge")).to_have_text("1 ready")
        await expect(card.locator(".facts")).to_have_text(re.compile("^waiting1running1 of 1"))
        await leave(*sent)
        await holds(stack, 0)

        worker = stack.workers[0].id
        await page.get_by_role("button", name=f"Drain {worker}").click()
        await expect(page.locator("#ask-text")).to_have_text(re.compile(f"No other worker serves {model}"))
        await window.answer("Drain")
        await window.shows("#message", f"{worker} has drained and is gone.")
        await expect(card.locator(".badge")).to_have_text("no worker")
        assert await stack.workers[0].ended() == 0
        assert window.complaints == []


async def test_batches_and_usage(nats_server: NatsServer, windows: Windows, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            keys.written(name, key, max_requests=None, operator=name == "ops")
            for name, key in (("alice", ALICE), ("ops", OPS))
        )
    )
    async with running(nats_server, api_keys_file=file) as stack, windows.open(stack) as window:
        page, headers = window.page, {"authorization": f"Bearer {ALICE}"}
        messages = [{"role": "user", "content": "[[tokens=2]]"}]
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
            | {"body": {"model": MODEL, "messages": messages if number else [{"role": "user", "content": FOR_EVER}]}}
            for number in range(3)
        ]
        uploaded = await stack.http.post(
            window.url + "v1/files",
            files={"file": ("in.jsonl", "\n".join(map(json.dumps, lines)).encode())},
            data={"purpose": "batch"},
            headers=headers,
        )
        body = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await stack.http.post(window.url + "v1/batches", json=body, headers=headers)).json()
        for _ in range(2):
            chat = {"model": MODEL, "messages": messages}
            await stack.http.post(window.url + "v1/chat/completions", json=chat, headers=headers)
        await page.get_by_label("API key").fill(OPS)
        await page.keyboard.press("Enter")
        await window.live()
        await window.to("batches")
        row = page.locator("#batches tbody tr")
        await expect(row.locator(".status")).to_have_text("in progress")
        await expect(row.locator("progress")).to_have_attribute("aria-label", re.compile(r"of 3 lines$"))
        await page.get_by_role("button", name=f"Cancel {batch['id']}").click()
        await window.answer("Cancel the batch")
        await expect(row.locator(".status")).to_have_text(re.compile("cancel"))
        await window.to("usage")
        await page.locator("#usage-by").select_option("key,model")
        usage = page.locator("#usage tbody tr", has_text="alice")
        await expect(usage).to_have_text(re.compile(f"^aliceHuggingFaceTB/{MODEL}[2-5]"))
        assert [told for told in window.complaints if "401" not in told] == []
