"""The system on deploy/nats/forebay.conf: all that it does, within the rights of its roles."""

import asyncio
import json
from pathlib import Path

import pytest
from nats.errors import NoRespondersError

from forebay_contracts.nats import topology
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.state import RequestStatus
from support.nats import flushed
from support.receiver import receivers, written
from support.secured import ROLES, Site, running
from support.stack import MODEL

CONSUMER = f"HuggingFaceTB-{MODEL}"


async def test_the_whole_system_works_within_its_rights(own_site: Site) -> None:
    async with running(own_site, apis=2, workers=1, max_concurrent_requests=2, api_keys="") as stack:
        # Whole, streamed, idempotent over two apis.
        assert (await stack.chat("[[tokens=3]]")).json()["choices"][0]["message"]["content"] == "t0 t1 t2"
        chunks = [
            chunk.choices[0].delta.content or ""
            async for chunk in await stack.openai().chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "[[tokens=5]]"}], stream=True
            )
            if chunk.choices
        ]
        assert "".join(chunks) == "t0 t1 t2 t3 t4"
        bodies = []
        for api in stack.apis:
            answer = await stack.http.post(
                f"{api.url}/v1/chat/completions",
                json={"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=2]]"}]},
                headers={"Idempotency-Key": "once"},
            )
            bodies.append(answer.json()["choices"][0]["message"]["content"])
        assert bodies == ["t0 t1", "t0 t1"]
        # Looked at and cancelled over the other api, while it runs.
        running_one = asyncio.create_task(stack.chat("[[tokens=500 delay_ms=50]]"))
        async with asyncio.timeout(20), stack.http.stream("GET", f"{stack.apis[1].url}/v1/queue/events") as events:
            request_id = ""
            async for line in events.aiter_lines():
                told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {"requests": []}
                if found := [request["id"] for request in told["requests"] if request["status"] == "processing"]:
                    request_id = found[0]
                    break
        other = stack.apis[1].url
        assert (await stack.http.get(f"{other}/v1/queue/request/{request_id}")).json()["status"] == "processing"
        assert (await stack.http.delete(f"{other}/v1/queue/request/{request_id}")).json()["cancelled"] is True
        assert (await running_one).status_code >= 400
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_cancelled"], status["workers_ready"]) == (3, 1, 1)
        assert "forebay_queue_up 1.0" in (await stack.http.get(f"{other}/metrics")).text
        # In order to its end: the heartbeat is taken out, what is kept is closed.
        assert await stack.workers[0].stop() == 0
        assert await stack.apis[1].stop() == 0
    assert not [line for line in own_site.server.log if "Violation" in line]


async def test_a_stored_response_within_its_rights(own_site: Site) -> None:
    async with running(own_site, apis=2, workers=1, max_concurrent_requests=2, api_keys="") as stack:
        one, two = stack.openai(0), stack.openai(1)
        conversation = await one.conversations.create()
        async with own_site.client("operator") as (client, refusals, _):
            heard = await client.subscribe("inference.answered.*")
            await flushed(client)
            made = await one.responses.create(model=MODEL, input="[[tokens=3]]", conversation=conversation.id)
            record = await heard.next_msg(timeout=10)
            assert (record.subject, refusals) == (names.answered_subject(names.request_id(made.id)), [])
        assert made.output_text == "t0 t1 t2"
        assert [item.type for item in (await two.responses.input_items.list(made.id)).data] == ["message"]
        # It runs in the background, is followed at the other api, and is looked at and cancelled by its id there.
        begun = await one.responses.create(model=MODEL, input="[[tokens=9000 delay_ms=20]]", background=True)
        async with asyncio.timeout(20), await two.responses.retrieve(begun.id, stream=True) as events:
            async for event in events:
                if event.type == "response.output_text.delta":
                    break
        state = await stack.http.get(f"{stack.apis[1].url}/v1/queue/request/{begun.id}")
        assert state.json()["status"] == "processing"
        code, printed = await own_site.forebay("operator", "requests", "--id", begun.id, "--json")
        assert code == 0, printed
        (shown,) = json.loads(printed)
        assert shown["id"] == state.json()["id"]
        assert shown["answer"][0].startswith("t0")
        code, printed = await own_site.forebay("admin", "cancel", begun.id)
        assert (code, printed) == (0, f"cancelled {shown['id']}\n")
        assert (await two.responses.retrieve(begun.id)).status == "cancelled"
        again = await stack.http.delete(f"{stack.apis[1].url}/v1/queue/request/{begun.id}")
        assert again.json() == {"id": shown["id"], "cancelled": False, "status": "cancelled"}
        # What is deleted is gone from the log, but for the mark that a cancelled one has ended.
        for identifier in (made.id, begun.id):
            await two.responses.delete(identifier)
        state_of_log = (await stack.connection.jetstream.stream_info(names.ANSWERS)).state
        assert state_of_log.messages == 1
        mark = await stack.connection.jetstream.get_msg(names.ANSWERS, state_of_log.last_seq)
        assert json.loads(mark.data or b"")["type"] == "failed"
        assert await stack.workers[0].stop() == 0
    assert not [line for line in own_site.server.log if "Violation" in line]


async def test_a_killed_worker_is_replaced_within_its_rights(own_site: Site) -> None:
    async with running(own_site, ack_wait=1) as stack:
        stream = await stack.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=40 delay_ms=50]]"}], stream=True
        )
        text = ""
        async for chunk in stream:
            if not text:
                await stack.workers[0].kill()
                await stack.worker()
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        assert text == " ".join(f"t{number}" for number in range(40))
    assert not [line for line in own_site.server.log if "Violation" in line]


async def test_a_worker_can_find_out_whether_an_api_is_connected(site: Site) -> None:
    worker, api = await site.connect("inference"), await site.connect("api")
    question = names.connected_subject("api-1")
    with pytest.raises(NoRespondersError):
        await worker.requests.request(question, timeout_s=10)
    await api.client.subscribe(names.reply_subjects("api-1"))
    await flushed(api.client)
    with pytest.raises(TimeoutError):
        await worker.requests.request(question, timeout_s=0.2)
    await api.close()
    with pytest.raises(NoRespondersError):
        await worker.requests.request(question, timeout_s=10)
    await worker.close()


async def test_operators_look_and_admins_steer(own_site: Site) -> None:
    async with running(own_site) as stack:
        await stack.chat("[[tokens=1]]")
        for look in (["status"], ["requests"], ["topology", "show"]):
            code, printed = await own_site.forebay("operator", *look)
            assert code == 0, printed
        steering = (["pause", MODEL], ["resume", MODEL], ["drain", stack.workers[0].id])
        for code, printed in await asyncio.gather(*(own_site.forebay("operator", *steer) for steer in steering)):
            assert code == 1, printed
            assert "may not publish to" in printed
        assert not (await stack.connection.jetstream.consumer_info("INFERENCE", CONSUMER)).paused
        # So does an api, for the page.
        for order, body in (("pause", {"model": MODEL}), ("resume", {"model": MODEL}), ("drain", {"worker": "nobody"})):
            answer = await stack.http.post(f"{stack.apis[0].url}/v1/queue/{order}", json=body)
            assert answer.status_code == (404 if order == "drain" else 200), answer.text
        for steer in steering:
            code, printed = await own_site.forebay("admin", *steer)
            assert code == 0, printed
        assert await stack.workers[0].ended() == 0


async def test_an_admin_calls_a_request_off(own_site: Site) -> None:
    async with running(own_site) as stack:
        waiting = asyncio.create_task(stack.chat("[[tokens=500 delay_ms=50]]"))
        request_id = (await stack.begins()).id
        assert (await own_site.forebay("operator", "cancel", request_id))[0] == 1
        code, printed = await own_site.forebay("admin", "cancel", request_id)
        assert code == 0, printed
        assert (await waiting).status_code >= 400
        assert (await stack.reaches(request_id, RequestStatus.CANCELLED)).error == "cancelled by the operator"


async def test_an_event_and_a_retry_within_their_rights(own_site: Site, tmp_path: Path) -> None:
    async with receivers("hook") as made:
        file = tmp_path / "webhooks.toml"
        file.write_text(written(made))
        async with running(own_site, webhooks_file=file, max_deliveries=1, api_keys="") as stack:
            begun = await stack.openai().responses.create(model=MODEL, input="[[tokens=1 fail]]", background=True)
            await made["hook"].receives(1)
            code, printed = await own_site.forebay("operator", "requests", "--failed", "--json")
            assert (code, len(json.loads(printed))) == (0, 1)
            url = f"{stack.apis[0].url}/v1/queue/request/{begun.id}/retry"
            assert (await stack.http.post(url)).status_code == 200
            first, second = await made["hook"].receives(2)
            assert (first.type, first.data.id) == (second.type, second.data.id) == ("response.failed", begun.id)
            assert first.id != second.id
            cancelled = await stack.openai().responses.create(
                model=MODEL, input="[[tokens=9000 delay_ms=20]]", background=True
            )
            await stack.reaches(names.request_id(cancelled.id), RequestStatus.PROCESSING)
            code, printed = await own_site.forebay("admin", "cancel", cancelled.id)
            assert code == 0, printed
            *_, last = await made["hook"].receives(3)
            assert (last.type, last.data.id) == ("response.cancelled", cancelled.id)
            await stack.openai().responses.delete(begun.id)
    assert not [line for line in own_site.server.log if "Violation" in line]


async def test_a_service_waits_for_a_topology_that_it_may_not_make(own_site: Site) -> None:
    env = load(Settings, **own_site.settings("inference"), _env_file=None)
    link = await own_site.connect("inference")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(topology, "START_PATIENCE_S", 0.5)
            with pytest.raises(ConfigurationError, match=r"stream INFERENCE is not there.*forebay topology apply"):
                await topology.ensure(link, env, env.served_model)
        waits = asyncio.create_task(topology.ensure(link, env, env.served_model, env.served_aliases))
        assert (await own_site.forebay("admin", "topology", "apply"))[0] == 0
        assert await waits == []
    finally:
        await link.close()


async def test_a_service_says_what_differs_and_goes_on(own_site: Site) -> None:
    async with running(own_site) as stack:
        api = await stack.api(max_queue_size=7)
        await api.logged("max_msgs 100 → 7 is wanted here: `forebay topology apply` makes it so")
        assert (await stack.status(1))["max_queue_size"] == 100
        assert (await stack.chat("[[tokens=1]]", api=1)).status_code == 200


async def test_doctor_says_what_a_user_may_and_what_it_lacks(own_site: Site) -> None:
    async def found(role: str, inboxes: str = "") -> list[dict[str, str]]:
        inboxes = inboxes or (role if role in ("api", "inference") else "cli")
        _, printed = await own_site.forebay(role, "doctor", "--role", inboxes, "--json")
        findings, _ = json.JSONDecoder().raw_decode(printed, printed.index("[\n"))
        problems = {finding["check"] for finding in findings if finding["severity"] == "problem"}
        # Nothing runs here. What a service's user may not ask is no problem of JetStream.
        assert problems <= {"permissions", "models", "services", "disk"}
        return [finding for finding in findings if finding["check"] == "permissions"]

    async with running(own_site, apis=0, workers=0):
        for role, findings in zip(ROLES, await asyncio.gather(*map(found, ROLES)), strict=True):
            assert findings[0]["severity"] == "ok"
            assert role in findings[0]["message"]
        (wrong,) = await found("inference", "api")
        assert wrong["message"] == ("with --role api, this user gets no answers: it may not subscribe to _INBOX.api.>")
        conf = own_site.folder / "forebay.conf"
        text = conf.read_text()
        assert text.count('"inference.resend.*", "inference.cancel.*"') == 1
        conf.write_text(text.replace('"inference.resend.*", "inference.cancel.*"', '"inference.cancel.*"'))
        own_site.server.restart()
        findings = await found("api")
        assert findings[0]["severity"] == "problem"
        assert findings[0]["message"] == "as api, this user may not publish to inference.resend.*"
        assert "API_MAY of deploy/nats/forebay.conf" in findings[0]["fix"]
