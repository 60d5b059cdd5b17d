"""Responses over a WebSocket, on the in-memory queue: one after the other, each a request with the usual errors."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from forebay_api import responses_socket as socket
from forebay_api.http.websocket import DRAINING
from forebay_api.openai.responses.format import ResponseFormat
from forebay_api.openai.responses.last import Last
from support.api import app
from support.responses import ended, record, text
from support.twins import MODEL, Twins, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_deliveries=1) as made:
        yield made


class Client:
    """A connection by ASGI."""

    def __init__(self, system: Twins, **headers: str) -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self._tells: asyncio.Queue[Any] = asyncio.Queue()
        self.say(type="websocket.connect")
        scope = {
            "type": "websocket",
            "path": "/v1/responses",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self.served = asyncio.ensure_future(cast(Any, app(system)(scope, self._tells.get, self.told.put)))

    def say(self, **message: Any) -> None:
        self._tells.put_nowait(message)

    def create(self, orders: str, **fields: Any) -> None:
        event = {"type": "response.create", "model": MODEL, "input": f"[[{orders}]]", "store": False, **fields}
        self.say(type="websocket.receive", text=json.dumps(event))

    async def hears(self) -> Any:
        async with asyncio.timeout(20):
            return await self.told.get()

    async def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.hears())["text"])
        return found

    async def turn(self) -> list[dict[str, Any]]:
        """The events up to the end of a response, or an error."""
        events = [await self.event()]
        while events[-1]["type"] not in ("error", "response.completed", "response.failed"):
            events.append(await self.event())
        return events


def words(response: dict[str, Any]) -> str:
    found: str = response["output"][0]["content"][0]["text"]
    return found


async def test_responses_follow_each_other(system: Twins) -> None:
    system.worker()
    client = Client(system)
    assert (await client.hears())["type"] == "websocket.accept"
    client.create("tokens=2")
    client.create("tokens=3", stream=True)
    client.create("tokens=1 fail")
    for wanted in ("t0 t1", "t0 t1 t2"):
        events = await client.turn()
        assert [event["type"] for event in events[:2]] == ["response.created", "response.queued"]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert words(events[-1]["response"]) == wanted
    assert (await client.turn())[-1]["response"]["error"]["code"] == "inference_failed"


async def test_a_response_goes_on_from_one_that_is_not_stored(system: Twins) -> None:
    system.worker()
    client = Client(system)
    await client.hears()
    client.create("", input="[[say]]a")
    first = (await client.turn())[-1]["response"]
    known = {"type": "item_reference", "id": first["output"][0]["id"]}
    said = {"role": "user", "content": "[[say]]b"}
    client.create("", input=[known, said], previous_response_id=first["id"])
    second = (await client.turn())[-1]["response"]
    assert (words(second), second["previous_response_id"]) == ("b", first["id"])
    client.create("", previous_response_id=second["id"], store=True)
    assert (await client.turn())[-1]["error"]["param"] == "store"


@pytest.mark.parametrize(
    ("data", "param", "code"),
    [
        ("{", None, "invalid_request_error"),
        ("[]", None, "invalid_type"),
        ({"type": None}, "type", "missing_required_parameter"),
        ({"type": "response.cancel"}, "type", "invalid_value"),
        ({"stream": False}, "stream", "invalid_value"),
        ({"background": True}, "background", "invalid_value"),
        ({"generate": False}, "generate", "unknown_parameter"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
async def test_an_error_has_its_status_and_ends_no_connection(
    system: Twins, data: Any, param: str | None, code: str
) -> None:
    system.worker()
    client = Client(system)
    await client.hears()
    if isinstance(data, str):
        client.say(type="websocket.receive", text=None, bytes=data.encode())
    else:
        client.create("tokens=1", **data)
    (event,) = await client.turn()
    assert (event["type"], event["status"]) == ("error", 404 if code == "model_not_found" else 400)
    assert (event["error"]["param"], event["error"]["code"]) == (param, code)
    client.create("tokens=1")
    assert (await client.turn())[-1]["type"] == "response.completed"


async def test_a_client_that_leaves_cancels_what_is_not_stored(system: Twins) -> None:
    client = Client(system)
    await client.hears()
    client.create("tokens=1")  # no worker takes it
    assert (await client.event())["type"] == "response.created"
    client.say(type="websocket.disconnect", code=1001)
    async with asyncio.timeout(20):
        await client.served
    assert not system.dispatcher.waiting


async def test_an_api_that_stops_ends_the_response_first(system: Twins) -> None:
    client = Client(system)
    await client.hears()
    client.create("tokens=2")
    await client.event()
    client.say(type=DRAINING)
    system.worker()
    assert words((await client.turn())[-1]["response"]) == "t0 t1"
    assert await client.hears() == {"type": "websocket.close", "code": socket.STOPPED}


async def test_after_an_hour_it_wants_a_new_connection(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "MAX_AGE_S", 0.0)
    client = Client(system)
    await client.hears()
    assert (await client.event())["error"]["code"] == "websocket_connection_limit_reached"
    assert await client.hears() == {"type": "websocket.close", "code": socket.TOO_OLD}


async def test_the_page_of_another_site_is_refused(system: Twins) -> None:
    client = Client(system, host="localhost", origin="https://example.com")
    assert (await client.hears())["status"] == 403
    assert json.loads((await client.hears())["body"])["error"]["code"] == "foreign_origin"
    await client.served


def test_only_the_last_response_that_went_well_is_held_and_only_once() -> None:
    last, of = Last(), record(store=False)
    assert last.take("resp_1") is None
    answer = ResponseFormat(of)
    last.keep(of.input, answer)
    assert last.take(None) is None
    assert last.take("resp_1") is None
    answer.whole([text("a")], ended())
    taken = last.take(of.id)
    assert taken is not None
    assert [item["role"] for item in taken] == ["user", "assistant"]
    assert last.take(of.id) is None
    broken = ResponseFormat(of)
    last.keep(of.input, broken)
    broken.opening()
    assert last.take(of.id) is None
