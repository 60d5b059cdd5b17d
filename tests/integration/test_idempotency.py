"""`Idempotency-Key`: asked again, answered once."""

import asyncio
import json

import httpx

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import idle, keys


async def ask(
    stack: Stack, order: str, key: str, api: int = 0, *, stream: bool = False, user: str = "me"
) -> httpx.Response:
    body = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": order}]}
    headers = {"idempotency-key": key, "authorization": f"Bearer {user}"}
    return await stack.http.post(f"{stack.apis[api].url}/v1/chat/completions", json=body, headers=headers)


def content(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def test_asked_again_while_it_runs_and_after(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2, max_concurrent_requests=4) as stack:
        order = "[[tokens=20 delay_ms=40]]"
        first = asyncio.create_task(ask(stack, order, "k"))
        await stack.begins()
        here, there = await asyncio.gather(ask(stack, order, "k"), ask(stack, order, "k", api=1))
        later = await ask(stack, order, "k", api=1)
        answers = [await first, here, there, later]
        assert [answer.status_code for answer in answers] == [200] * 4
        # All are told the one request that ran.
        (request_id,) = {answer.headers["x-request-id"] for answer in answers}
        assert {answer.json()["id"] for answer in answers} == {f"chatcmpl-{request_id}"}
        await stack.reaches(request_id, RequestStatus.COMPLETED)
        for api in stack.apis:
            looked_up = await stack.http.get(f"{api.url}/v1/queue/request/{request_id}")
            assert (looked_up.status_code, looked_up.json()["status"]) == (200, "completed")
        assert {content(answer) for answer in answers} == {" ".join(f"t{n}" for n in range(20))}
        assert (await stack.status())["total_queued"] == 1
        # Another client's key of the same name is another key.
        assert (await ask(stack, order, "k", user="other")).status_code == 200
        assert (await stack.status())["total_queued"] == 2


async def test_client_that_left_and_asks_again_gets_the_same_run(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        order = "[[tokens=40 delay_ms=40]]"
        async with httpx.AsyncClient() as leaving:
            body = {"model": MODEL, "messages": [{"role": "user", "content": order}]}
            url = f"{stack.apis[0].url}/v1/chat/completions"
            headers = {"idempotency-key": "k", "authorization": "Bearer me"}
            task = asyncio.create_task(leaving.post(url, json=body, headers=headers))
            request_id = (await stack.begins()).id
            task.cancel()
        answer = await ask(stack, order, "k")
        assert content(answer) == " ".join(f"t{n}" for n in range(40))
        assert answer.json()["id"].startswith("chatcmpl-")
        assert (await stack.reaches(request_id, RequestStatus.COMPLETED)).attempt == 1
        assert (await stack.status())["total_queued"] == 1


async def test_streams_are_given_again_too(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2) as stack:
        texts, ids = [], set()
        for api in (0, 1, 1):
            answer = await ask(stack, "[[tokens=5]]", "k", api, stream=True)
            assert answer.text.endswith("data: [DONE]\n\n")
            assert f'"id":"chatcmpl-{answer.headers["x-request-id"]}"' in answer.text
            ids.add(answer.headers["x-request-id"])
            texts.append("".join(part.split('"')[0] for part in answer.text.split('"content":"')[1:]))
        assert texts == ["t0 t1 t2 t3 t4"] * 3
        assert len(ids) == 1
        assert (await stack.status())["total_queued"] == 1


async def test_a_key_is_of_one_body(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2) as stack:
        assert (await ask(stack, "[[tokens=1]]", "k")).status_code == 200
        for api in (0, 1):
            reused = await ask(stack, "[[tokens=2]]", "k", api)
            assert reused.status_code == 422
            assert reused.json()["error"]["code"] == "idempotency_key_reused"
        for bad in ("", "x" * 256, "a b"):
            assert (await ask(stack, "hi", bad)).status_code == 400


async def test_an_error_is_not_kept(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1) as stack:
        for _ in range(2):
            assert (await ask(stack, "[[tokens=1 fail]]", "k")).status_code == 500
        assert (await idle(stack))["total_failed"] == 2


async def test_it_outlives_its_client_and_its_api(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2, max_concurrent_requests=2) as stack:
        order = "[[tokens=40 delay_ms=50]]"
        first = asyncio.create_task(ask(stack, order, "k"))
        await stack.begins()
        await stack.apis[0].kill()
        (failure,) = await asyncio.gather(first, return_exceptions=True)
        assert isinstance(failure, httpx.HTTPError)
        assert content(await ask(stack, order, "k", api=1)) == " ".join(f"t{n}" for n in range(40))
        assert (await stack.status(api=1))["total_queued"] == 1


async def test_a_key_whose_request_was_never_admitted_is_free_again(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        assert (await ask(stack, "[[tokens=2]]", "k")).status_code == 200
        bucket = await stack.connection.jetstream.key_value("inference-answers")
        (key,) = await keys(stack, "inference-answers")
        claim = json.loads((await bucket.get(key)).value or b"")
        for age_s in (60, 29):  # the younger one may still be admitted, so it is waited for
            lost = claim | {"request_id": f"lost-{age_s}", "created_at": claim["created_at"] - age_s}
            await bucket.put(key, json.dumps(lost).encode())
            assert content(await ask(stack, "[[tokens=2]]", "k")) == "t0 t1"
        await bucket.put(key, json.dumps(claim | {"schema_version": 1}).encode())
        assert (await ask(stack, "[[tokens=2]]", "k")).status_code == 503
