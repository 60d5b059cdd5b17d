"""Files and batches by the OpenAI SDK's own helpers, on a real nats-server and the simulated engine."""

import asyncio
import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from forebay_api.in_flight.files import CHUNK_BYTES, Files
from forebay_api.openai.batches.record import BatchRecord
from forebay_api.openai.batches.stored import Batches
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import FileStoreFull, KeyLimitReached
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.seams import connected
from support.stack import MODEL, Stack, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILES = names.object_stream(names.FILES_BUCKET)
URL = "/v1/chat/completions"
CONTENT = b'{"a": 1}\n' * 50_000
"""450 KB: four chunks."""

KEYS = f"""
[alice]
sha256 = "{hashlib.sha256(b"alice-secret").hexdigest()}"
[bob]
sha256 = "{hashlib.sha256(b"bob-secret").hexdigest()}"
[root]
sha256 = "{hashlib.sha256(b"root-secret").hexdigest()}"
operator = true
"""


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL, **body}}


def chat(custom_id: str, orders: str = "tokens=2") -> dict[str, Any]:
    return line(custom_id, URL, messages=[{"role": "user", "content": f"[[{orders}]]"}])


async def made(client: openai.AsyncOpenAI, *lines: dict[str, Any], endpoint: Any = URL, **more: Any) -> Batch:
    data = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


async def reaches(client: openai.AsyncOpenAI, batch: Batch, *statuses: str) -> Batch:
    async with asyncio.timeout(60):
        while batch.status not in statuses:
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def left_in_the_log(stack: Stack) -> dict[str, int]:
    info = await stack.connection.jetstream.stream_info(names.ANSWERS, subjects_filter=names.ANSWER_SUBJECTS)
    return info.state.subjects or {}


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(one) for one in (await client.files.content(file_id)).text.splitlines()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(KEYS)
    limits = {"api_keys_file": keys, "max_file_bytes": 1_000_000, "file_store_bytes": 4_000_000}
    async with running(module_nats, apis=2, workers=1, max_concurrent_requests=4, **limits) as running_stack:
        yield running_stack


def of(stack: Stack, name: str, api: int = 0) -> openai.AsyncOpenAI:
    return stack.openai(api, api_key=f"{name}-secret")


async def test_a_file_is_there_for_its_key_and_for_operators_at_every_api(stack: Stack) -> None:
    alice, bob, root = of(stack, "alice"), of(stack, "bob", 1), of(stack, "root", 1)
    file = await alice.files.create(
        file=("a.jsonl", CONTENT), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3_600}
    )
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(CONTENT), "a.jsonl", "user_data", "processed")
    assert file.expires_at == file.created_at + 3_600
    for client in (alice, root):
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).content == CONTENT
        assert file in [one async for one in client.files.list(purpose="user_data")]
    for refused in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            await refused(file.id)
    assert file.id not in [one.id async for one in bob.files.list()]
    assert (await alice.files.delete(file.id)).deleted
    for name in (file.id, "file-unknown", "file-" + "0" * 32, "*"):
        with pytest.raises(openai.NotFoundError):
            await root.files.retrieve(name)
    left = await stack.connection.jetstream.stream_info(FILES, subjects_filter="$O.inference-files.C.>")
    assert left.state.subjects is None


async def test_files_are_listed_in_pages(stack: Stack) -> None:
    bob = of(stack, "bob")
    made = [(await bob.files.create(file=(f"{n}", b"x"), purpose="batch")).id for n in range(3)]
    assert [one.id async for one in bob.files.list(limit=2, order="asc", purpose="batch")] == made
    assert [one.id async for one in bob.files.list(limit=1)] == made[::-1]
    assert [one.id async for one in bob.files.list(after=made[1])] == made[:1]
    for name in made:
        await bob.files.delete(name)


async def test_what_is_no_upload(stack: Stack) -> None:
    alice = of(stack, "alice")
    with pytest.raises(openai.APIStatusError) as too_large:
        await alice.files.create(file=("a", b"x" * 1_000_001), purpose="batch")
    assert (too_large.value.status_code, too_large.value.code) == (413, "request_too_large")
    for purpose, seconds, param in (
        ("vision", 3_600, "purpose"),
        ("batch", 60, "expires_after.seconds"),
        ("batch", 10**400, "expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as wrong:
            await alice.files.create(
                file=("a", b"x" * 200_000),  # more than a chunk: it is stored before the form is whole
                purpose=purpose,  # type: ignore[arg-type]
                expires_after={"anchor": "created_at", "seconds": seconds},
            )
        assert wrong.value.param == param
    url, headers = f"{stack.apis[0].url}/v1/files", {"Authorization": "Bearer alice-secret"}
    answer = await stack.http.post(url, headers=headers, json={})
    assert (answer.status_code, "form" in answer.json()["error"]["message"]) == (400, True)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(count):
            yield b"y" * 200_000

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    # Without a length, it is too large only once it has come.
    for count, status in ((6, 413), (2, 400)):
        answer = await stack.http.post(url, headers=headers | kind, content=pieces(count))
        assert answer.status_code == status, answer.text
    assert [one.id async for one in alice.files.list()] == []
    left = await stack.connection.jetstream.stream_info(FILES, subjects_filter="$O.inference-files.C.>")
    assert left.state.subjects is None


async def test_a_full_store_refuses_uploads_by_name(stack: Stack) -> None:
    alice = of(stack, "alice")
    made = [await alice.files.create(file=("a", b"x" * 900_000), purpose="batch") for _ in range(3)]
    with pytest.raises(openai.InternalServerError) as full:
        await alice.files.create(file=("a", b"x" * 950_000), purpose="batch")
    assert (full.value.status_code, full.value.code) == (503, "file_store_full")
    assert full.value.response.headers["x-should-retry"] == "false"
    # One key leaves room for another.
    with pytest.raises(openai.InternalServerError, match="your key `alice` has 2700000 bytes of files"):
        await alice.files.create(file=("a", b"x" * 300_000), purpose="batch")
    other = await of(stack, "bob", 1).files.create(file=("a", b"x" * 300_000), purpose="batch")
    for one in (*made, other):
        await of(stack, "root").files.delete(one.id)


async def test_no_key_takes_the_places_of_others(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.openai.batches.stored.MAX_BATCHES", 10)

    def record(key: str | None) -> BatchRecord:
        fields = {"endpoint": URL, "input_file_id": "", "completion_window": "1h", "kept_s": 1, "window": 1}
        return BatchRecord(id=f"batch_{uuid.uuid4().hex}", key=key, created_at=0, expires_at=0, **fields)

    async with connected(nats_server) as connection:
        batches = Batches(connection)
        for _ in range(8):
            await batches.create(record("alice"))
        with pytest.raises(KeyLimitReached, match="Your key `alice` has 8 batches that have not ended"):
            await batches.create(record("alice"))
        await batches.create(record("bob"))
        await batches.create(record(None))


async def test_a_full_store_removes_what_killed_uploads_have_left(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, last = of(stack, "alice"), 0
    file = await alice.files.create(file=("a", CONTENT), purpose="batch")
    files = Files(stack.connection)
    for _ in range(18):
        last = await files.append("0" * 32, bytes(CHUNK_BYTES), last, 3_600)
    with pytest.raises(FileStoreFull):  # the upload may still be coming
        await files.need_room(1_000_000)
    monkeypatch.setattr("forebay_api.in_flight.files.ORPHAN_S", 0.0)
    await Files(stack.connection).need_room(1_000_000)
    left = await stack.connection.jetstream.stream_info(FILES, subjects_filter="$O.inference-files.C.>")
    assert list((left.state.subjects or {}).values()) == [4]
    assert (await alice.files.content(file.id)).content == CONTENT
    await alice.files.delete(file.id)


@pytest.mark.parametrize(
    ("endpoint", "body", "shape"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "[[tokens=2]]"}]}, "chat.completion"),
        ("/v1/completions", {"prompt": "[[tokens=2]]"}, "text_completion"),
        ("/v1/embeddings", {"input": ["a", "b"]}, "list"),
        ("/v1/responses", {"input": "[[tokens=2]]"}, "response"),
    ],
)
async def test_a_batch_of_each_endpoint(stack: Stack, endpoint: str, body: dict[str, Any], shape: str) -> None:
    alice, bob = of(stack, "alice"), of(stack, "bob")
    lines = [line(f"r{number}", endpoint, **body) for number in range(10)]
    wrong = {**line("wrong", endpoint, **body), "method": "GET"}
    batch = await made(alice, *lines, wrong, endpoint=endpoint, metadata={"night": "1"})
    assert (batch.status, batch.object, batch.completion_window) == ("validating", "batch", "24h")
    ended = await reaches(of(stack, "root", 1), batch, "completed")
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 11, "completed": 10, "failed": 1}
    assert (ended.endpoint, ended.metadata, ended.errors) == (endpoint, {"night": "1"}, None)
    assert ended.created_at <= (ended.in_progress_at or 0) <= (ended.finalizing_at or 0) <= (ended.completed_at or 0)
    assert ended.usage is not None
    assert ended.usage.total_tokens > 0
    output = await lines_of(alice, ended.output_file_id)
    assert {one["custom_id"] for one in output} == {f"r{number}" for number in range(10)}
    assert {one["response"]["body"]["object"] for one in output} == {shape}
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in output)
    errors = await lines_of(alice, ended.error_file_id)
    assert [(one["custom_id"], one["response"], one["error"]["code"]) for one in errors] == [
        ("wrong", None, "invalid_method")
    ]
    with pytest.raises(openai.NotFoundError):
        await bob.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        await bob.files.content(ended.output_file_id or "")
    assert batch.id not in [one.id async for one in bob.batches.list()]


async def test_batches_are_listed_newest_first_and_what_is_none_is_refused(stack: Stack) -> None:
    bob = of(stack, "bob")
    batches = [await made(bob, chat("a")) for _ in range(3)]
    for batch in batches:
        await reaches(bob, batch, "completed")
    assert [one.id async for one in bob.batches.list(limit=2)] == [batch.id for batch in reversed(batches)]
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        await bob.batches.cancel(batches[0].id)
    kept = {"anchor": "created_at", "seconds": 3_600}
    file = await bob.files.create(file=("a", b"{}"), purpose="user_data")
    short = await bob.files.create(file=("a", b"{}"), purpose="batch", expires_after=kept)  # type: ignore[arg-type]
    for file_id, endpoint, window, param in (
        ("file-unknown", URL, "24h", "input_file_id"),
        (file.id, URL, "24h", "input_file_id"),
        (short.id, URL, "24h", "input_file_id"),
        (short.id, "/v1/files", "24h", "endpoint"),
        (short.id, URL, "8d", "completion_window"),
    ):
        with pytest.raises(openai.BadRequestError) as wrong:
            await bob.batches.create(
                input_file_id=file_id,
                endpoint=endpoint,
                completion_window=window,  # type: ignore[arg-type]
            )
        assert wrong.value.param == param
    for batch_id in ("batch_unknown", "batch_" + "0" * 32, "*"):
        with pytest.raises(openai.NotFoundError):
            await bob.batches.retrieve(batch_id)


async def test_a_batch_is_cancelled_at_another_api(stack: Stack) -> None:
    alice, other = of(stack, "alice"), of(stack, "alice", 1)
    batch = await made(alice, *(chat(f"r{number}", "tokens=20 delay_ms=50") for number in range(50)))
    await reaches(alice, batch, "in_progress")
    cancelling = await other.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    ended = await reaches(alice, batch, "cancelled")
    output = await lines_of(alice, ended.output_file_id) if ended.output_file_id else []
    errors = await lines_of(alice, ended.error_file_id)
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert Counter(one["custom_id"] for one in output + errors) == {f"r{number}": 1 for number in range(50)}


async def test_another_api_goes_on_where_one_was_killed(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=1, workers=1, max_concurrent_requests=4) as stack:
        # After the first ones come some that take longer than it takes to kill an api.
        orders = ["tokens=5 delay_ms=20"] * 20 + ["tokens=5 delay_ms=800"] * 8 + ["tokens=5 delay_ms=20"] * 92
        batch = await made(stack.openai(0), *(chat(f"r{number}", order) for number, order in enumerate(orders)))
        await reaches(stack.openai(0), batch, "in_progress")
        await stack.api()
        async with asyncio.timeout(30):
            while (batch.request_counts is None) or batch.request_counts.completed < 20:
                await asyncio.sleep(0.05)
                batch = await stack.openai(0).batches.retrieve(batch.id)
        metrics = (await stack.http.get(f"{stack.apis[0].url}/metrics")).text
        assert 'forebay_batches{status="running"} 1.0' in metrics
        await stack.apis[0].kill()
        ended = await reaches(stack.openai(1), batch, "completed")
        metrics = (await stack.http.get(f"{stack.apis[1].url}/metrics")).text
        assert 'forebay_batches_finished_total{status="completed"} 1.0' in metrics
        (lines,) = re.findall(r'forebay_batch_lines_total{result="completed"} (\d+)', metrics)
        assert 0 < int(lines) <= 100  # the other api has counted its own
        output = await lines_of(stack.openai(1), ended.output_file_id)
        assert Counter(one["custom_id"] for one in output) == {f"r{number}": 1 for number in range(120)}
        texts = {one["response"]["body"]["choices"][0]["message"]["content"] for one in output}
        assert texts == {"t0 t1 t2 t3 t4"}
        assert (await stack.states.totals())[RequestStatus.COMPLETED] == 120
        # The last record of each answer stays for a while, and the answers that the killed api had just written.
        async with asyncio.timeout(30):
            while sum(count > 1 for count in (await left_in_the_log(stack)).values()) > 60:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
