"""Failed work on real processes: seen by its owner and by operators, and run again, once."""

import asyncio
import contextlib
import uuid
from pathlib import Path

import httpx
import openai
import pytest

from forebay_api.in_flight.records import key_of, owner_token
from forebay_contracts import keys
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.failed import FailedRequest, FailedRequests
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus
from support.command import run
from support.nats import NatsServer
from support.seams import connected
from support.stack import MODEL, running
from support.twins import request

WORDS = " ".join(f"t{number}" for number in range(20))


async def test_failed_requests_are_kept_listed_and_removed(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        failed, made = FailedRequests(connection), []
        for number, owner in enumerate(("alice", "bob", "alice")):
            one = request("", key=owner, record=key_of("chat", owner, str(number)))
            made.append(FailedRequest(state=transitions.queued(one, number), request=one))
            await failed.keep(made[-1])
        alice = owner_token("alice")
        assert await failed.get(alice, made[0].request.id) == made[0]
        assert await failed.get(alice, made[1].request.id) is None
        assert await failed.page("*") == [one.state for one in made]
        assert await failed.page(alice, after=made[0].request.id) == [made[2].state]
        assert await failed.page("*", most=2) == [one.state for one in made[:2]]
        assert await failed.page(alice, after=made[1].request.id) is None
        await failed.remove(made[0].request)
        assert await failed.page(alice) == [made[2].state]


async def test_failed_work_is_seen_and_runs_again(nats_server: NatsServer, tmp_path: Path) -> None:
    made = {name: keys.make() for name in ("root", "alice", "bob")}
    file = tmp_path / "keys.toml"
    entries = [keys.written(name, key, max_requests=None, operator=name == "root") for name, key in made.items()]
    file.write_text("\n".join(entries))
    system = running(nats_server, apis=2, max_deliveries=1, api_keys_file=file)
    async with system as stack, contextlib.AsyncExitStack() as clients:

        async def client(name: str, api: int = 0) -> httpx.AsyncClient:
            headers = {"authorization": f"Bearer {made[name]}"}
            return await clients.enter_async_context(httpx.AsyncClient(base_url=stack.apis[api].url, headers=headers))

        alice, bob, root, other = (
            await client("alice"),
            await client("bob"),
            await client("root"),
            await client("root", 1),
        )
        sdk = stack.openai(api_key=made["alice"])
        begun = await sdk.responses.create(model=MODEL, input="[[tokens=20 delay_ms=100]]", background=True)
        old_id = str(uuid.UUID(begun.id.removeprefix("resp_")))
        await stack.begins()
        await stack.workers[0].kill()
        await stack.worker()
        state = await stack.reaches(old_id, RequestStatus.FAILED)
        assert state.retryable

        # Who sees it, and who sees why.
        (seen,) = (await alice.get("/v1/queue/failed")).json()["data"]
        assert (seen["id"], seen["model"], seen["error"]) == (old_id, state.model, "generation failed in 1 attempts")
        assert seen["fault"] is None
        assert (await bob.get("/v1/queue/failed")).json()["data"] == []
        (seen,) = (await root.get("/v1/queue/failed")).json()["data"]
        assert "the worker was killed" in seen["fault"]
        assert (await bob.post(f"/v1/queue/request/{old_id}/retry")).status_code == 404
        assert (await alice.post("/v1/queue/request/a.b/retry")).status_code == 404

        # It runs once, whoever runs it again, and is answered under its id.
        answers = await asyncio.gather(
            *(one.post(f"/v1/queue/request/{begun.id}/retry") for one in (alice, alice, root, other))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["retried_as"] for answer in answers} == {names.retry_id(old_id)}
        await stack.reaches(names.retry_id(old_id), RequestStatus.COMPLETED)
        whole = await sdk.responses.retrieve(begun.id)
        assert (whole.id, whole.status, whole.output_text) == (begun.id, "completed", WORDS)
        shown = (await alice.get(f"/v1/queue/request/{old_id}")).json()
        assert (shown["status"], shown["retried_as"]) == ("failed", names.retry_id(old_id))
        assert (await alice.get("/v1/queue/failed")).json()["data"] == []
        totals = await stack.states.totals()
        assert (totals[RequestStatus.FAILED], totals[RequestStatus.COMPLETED]) == (1, 1)
        assert (await alice.post(f"/v1/queue/request/{old_id}/retry")).json()["retried_as"] == names.retry_id(old_id)
        follow_up = await sdk.responses.create(model=MODEL, input="[[tokens=1]]", previous_response_id=begun.id)
        assert follow_up.status == "completed"

        # By the page, a model or a time on the command line; what was deleted is gone.
        chats = [await _failing_chat(sdk) for _ in range(3)]
        await stack.all_reach(chats, RequestStatus.FAILED)
        first = (await alice.get("/v1/queue/failed", params={"limit": 2})).json()
        assert ([one["id"] for one in first["data"]], first["has_more"]) == (chats[:2], True)
        rest = (await alice.get("/v1/queue/failed", params={"limit": 2, "after": first["last_id"]})).json()
        assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (chats[2:], False)
        assert (await alice.get("/v1/queue/failed", params={"after": "unknown"})).status_code == 400
        assert (await alice.delete(f"/v1/chat/completions/chatcmpl-{chats[0]}")).status_code == 200
        env = stack.env()
        url = ("--base-url", f"{stack.apis[0].url}/v1", "--api-key", made["root"])
        listed = await run("requests", "--failed", "--json", env=env)
        assert [one["id"] for one in listed.json()] == chats[1:]
        retried = await run("retry", "--model", MODEL, "--since", "1h", *url, env=env)
        again = [names.retry_id(one) for one in chats[1:]]
        assert [line.split()[-1] for line in retried.stdout.splitlines()] == again
        await stack.all_reach(again, RequestStatus.FAILED)
        # The first id finds what has failed last.
        third = (await alice.post(f"/v1/queue/request/{chats[1]}/retry")).json()["retried_as"]
        assert third == names.retry_id(again[0])
        await stack.all_reach([third], RequestStatus.FAILED)
        refused = await run("retry", chats[0], *url, env=env)
        assert refused.code == 1
        assert "No failed request" in refused.stderr


async def _failing_chat(sdk: openai.AsyncOpenAI) -> str:
    with pytest.raises(openai.InternalServerError) as told:
        await sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=1 fail]]"}], store=True
        )
    return told.value.response.headers["x-request-id"]
