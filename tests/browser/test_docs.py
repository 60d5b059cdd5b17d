import json
from urllib.parse import urljoin

from playwright.async_api import expect

from support.browser import WAIT_MS, Windows
from support.nats import NatsServer
from support.stack import running


async def test_swagger_ui_shows_our_operations_and_asks_nobody_else(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server) as stack, windows.open(stack) as window:
        await window.live()
        window.asked.clear()
        answer = await window.page.goto(urljoin(window.url, "/docs"))
        assert answer is not None
        document = (await stack.http.get(urljoin(window.url, "/openapi.json"))).json()
        assert "security" not in json.dumps(document)  # no key is needed here, so none is asked for
        operations = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
        shown = window.page.locator(".opblock-summary")
        await expect(shown).to_have_count(len(operations), timeout=WAIT_MS)
        assert {
            f"{await line.locator('.opblock-summary-method').inner_text()} "
            f"{await line.locator('.opblock-summary-path').get_attribute('data-path')}"
            for line in await shown.all()
        } == operations
        assert "POST /v1/chat/completions" in operations

        # It runs as far as calling an operation, with nothing that the headers forbid.
        models = window.page.locator(".opblock", has=window.page.locator("[data-path='/v1/models']"))
        await models.locator(".opblock-summary-control").click()
        await models.get_by_role("button", name="Try it out").click()
        await models.get_by_role("button", name="Execute").click()
        status = models.locator(".live-responses-table .response .response-col_status")
        await expect(status).to_have_text("200", timeout=WAIT_MS)

        assert urljoin(window.url, "/docs/swagger-ui.js") in window.asked
        # The icons of its style sheet lie in it as data URLs.
        assert [url for url in window.elsewhere() if not url.startswith("data:")] == []
        assert window.complaints == []
        assert answer.headers["content-security-policy"] == (
            "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; img-src 'self' data:"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_a_key_is_asked_for_where_one_is_needed(nats_server: NatsServer, windows: Windows) -> None:
    async with running(nats_server, api_keys="a-key-of-enough-length") as stack:
        document = (await stack.http.get(f"{stack.apis[0].url}/openapi.json")).json()
        asking = {path for path, methods in document["paths"].items() if all("security" in m for m in methods.values())}
        assert asking == {path for path in document["paths"] if path.startswith(("/v1", "/v2"))}
        async with windows.open(stack) as window:
            page = window.page
            await page.goto(urljoin(window.url, "/docs"))
            models = page.locator(".opblock", has=page.locator("[data-path='/v1/models']"))
            await models.locator(".opblock-summary-control").click()
            await models.get_by_role("button", name="Try it out").click()
            status = models.locator(".live-responses-table .response .response-col_status")
            await models.get_by_role("button", name="Execute").click()
            await expect(status).to_have_text("401", timeout=WAIT_MS)
            await page.locator(".auth-wrapper > .authorize").click()
            await page.locator(".auth-container input").fill("a-key-of-enough-length")
            await page.locator(".auth-container").get_by_role("button", name="Apply credentials").click()
            await page.locator(".modal-ux .close-modal").click()
            await models.get_by_role("button", name="Execute").click()
            await expect(status).to_have_text("200", timeout=WAIT_MS)
