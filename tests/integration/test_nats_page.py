"""docs/nats-cli.md: the requests behind its commands that change something, what they answer, and its names."""

import asyncio
import base64
import json
import re
import shlex
from pathlib import Path

import pytest

from forebay_contracts.nats.permissions import covers
from forebay_contracts.settings import ApiSettings, InferenceSettings
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.secured import Site
from support.secured import running as running_secured
from support.stack import MODEL, running
from support.view import consumer_reaches, holds, idle, jetstream

CONSUMER = f"HuggingFaceTB-{MODEL}"
ROOT = Path(__file__).parents[2]


async def test_pause_counter_purge_and_drain(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        await idle(stack)
        total = await jetstream(
            stack, "STREAM.MSG.GET.INFERENCE_COUNTERS", {"last_by_subj": "inference.counters.completed"}
        )
        assert json.loads(base64.b64decode(total["message"]["data"])) == {"val": "1"}
        pause = f"CONSUMER.PAUSE.INFERENCE.{CONSUMER}"
        assert (await jetstream(stack, pause, {"pause_until": "2099-01-01T00:00:00Z"}))["paused"] is True
        waits = asyncio.create_task(stack.chat("[[tokens=1]]"))
        await holds(stack, 1)
        await consumer_reaches(stack, CONSUMER, num_pending=1, num_ack_pending=0)
        purged = await jetstream(stack, "STREAM.PURGE.INFERENCE", {"filter": f"inference.requests.{CONSUMER}.*"})
        assert (purged["success"], purged["purged"]) == (True, 1)
        waits.cancel()
        assert (await jetstream(stack, pause, {}))["paused"] is False
        drained = await stack.connection.client.request(f"inference.drain.{stack.workers[0].id}", b"", timeout=5)
        assert json.loads(drained.data) == {"draining": stack.workers[0].id, "running": 0}
        assert await stack.workers[0].ended() == 0


async def test_a_stored_answer_is_read_and_removed(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        heard = await stack.connection.client.subscribe("inference.answered.*")
        stored = await stack.openai().responses.create(model=MODEL, input="[[tokens=4 delay_ms=30]]")
        subject = names.answer_subject(names.request_id(stored.id))
        last = await jetstream(stack, "STREAM.MSG.GET.INFERENCE_ANSWERS", {"last_by_subj": subject})
        records = []
        while not records or b'"completed"' not in records[-1].data:
            records.append(await heard.next_msg(timeout=10))
        assert {record.subject for record in records} == {names.answered_subject(names.request_id(stored.id))}
        assert base64.b64decode(last["message"]["data"]) == records[-1].data
        sequences = ["0", *(record.headers["Nats-Sequence"] for record in records)]
        assert [record.headers["Nats-Last-Sequence"] for record in records] == sequences[:-1]
        frames = [json.loads(line) for record in records for line in record.data.splitlines()]
        assert [frames[0]["type"], frames[-1]["type"]] == ["started", "completed"]
        deltas = [frame for frame in frames if frame["type"] == "delta"] + frames[-1].get("deltas", [])
        assert "".join(delta["text"] for delta in deltas) == stored.output_text == "t0 t1 t2 t3"
        by_subject = await jetstream(stack, "STREAM.INFO.INFERENCE_ANSWERS", {"subjects_filter": ">"})
        assert by_subject["state"]["subjects"] == {subject: len(records)}
        purged = await jetstream(stack, "STREAM.PURGE.INFERENCE_ANSWERS", {"filter": subject})
        assert purged["purged"] == len(records)


async def test_what_runs_is_not_ended_by_a_purge(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        runs = asyncio.create_task(stack.chat("[[tokens=20 delay_ms=50]]"))
        await stack.begins()
        purged = await jetstream(stack, "STREAM.PURGE.INFERENCE", {"filter": f"inference.requests.{CONSUMER}.*"})
        assert purged["purged"] == 1
        answer = await runs
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 20)
        await stack.reaches(answer.headers["x-request-id"], RequestStatus.COMPLETED)


async def test_what_an_operator_hears_of_workers(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    site.server.start()
    try:
        async with running_secured(site, apis=0) as stack, site.client("operator") as (client, refusals, _):
            heard = await client.subscribe("$KV.inference-workers.*")
            beat = json.loads((await heard.next_msg(timeout=10)).data)
            assert (beat["id"], refusals) == (stack.workers[0].id, [])
    finally:
        site.server.stop()


def commands(page: Path) -> list[list[str]]:
    """The words of each `nats` command of a page."""
    found = re.findall(r"`(nats [^`]*)`|^(nats [^#\n]*)", page.read_text(), re.MULTILINE)
    return [shlex.split(quoted or plain) for quoted, plain in found]


@pytest.mark.parametrize("page", ["docs/nats-cli.md", "README.md"])
def test_each_name_of_a_page_is_one_of_ours(page: str) -> None:
    buckets = {names.REQUESTS_BUCKET, names.WORKERS_BUCKET, names.APIS_BUCKET, names.ANSWERS_BUCKET}
    buckets |= {names.BATCHES_BUCKET, names.FILES_BUCKET}
    streams = {names.STREAM, names.COUNTERS, names.ANSWERS, names.DEFERRED, names.BATCHES}
    streams |= {names.WEBHOOKS, names.FAILED, names.USAGE}
    subjects = [
        names.STREAM_SUBJECTS,
        names.COUNTER_SUBJECTS,
        names.USAGE_SUBJECTS,
        names.reply_subjects("*"),
        names.answer_subject("*"),
        names.answered_subject("*"),
        names.drain_subject("*"),
        names.DEFERRED_SUBJECTS,
        names.FAILED_SUBJECTS,
        names.idle_subject("*"),
        *map(names.bucket_subjects, buckets),
    ]
    words = [word for command in commands(ROOT / page) for word in command]
    assert len(words) > 10
    for word in words:
        if word.startswith("INFERENCE"):
            assert word in streams
        elif word.startswith("inference-"):
            assert word in buckets
        elif word.startswith(("inference.", "$KV.")):
            assert any(covers(subject, word) for subject in subjects), word
    assert not {word for word in words if word.startswith("inference.requests.")} - {names.model_subjects("CONSUMER")}
    totals = {word for word in words if word.startswith("inference.counters.")}
    assert totals <= {names.counter_subject(outcome) for outcome in RequestStatus if outcome.final}


def test_the_rule_of_the_consumers_name_is_that_of_the_code() -> None:
    page = (ROOT / "docs/nats-cli.md").read_text()
    example = re.search(r"`(\S+/\S+)` is `(\S+)`\.", page)
    assert example is not None
    assert names.model_token(example[1]) == example[2]
    assert names.model_token("/a..b_c d!") == "a-b_c-d"


def test_the_context_has_the_keys_that_nats_knows() -> None:
    context = json.loads((ROOT / "deploy/nats/context.json").read_text())
    # github.com/nats-io/jsm.go, natscontext/context.go
    known = "description url token user password creds nkey cert key ca inbox_prefix"
    assert set(context) == set(known.split())
    assert context["url"] == "nats://127.0.0.1:4222"
    assert context["inbox_prefix"] == "_INBOX.cli"


def test_each_metric_and_setting_of_troubleshooting_is_there() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    metrics = (ROOT / "docs/reference/metrics.md").read_text()
    named = set(re.findall(r"forebay_[a-z_]+", page))
    assert len(named) >= 6
    assert {name for name in named if f"`{name}`" not in metrics} == set()
    fields = ApiSettings.model_fields | InferenceSettings.model_fields
    settings = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", page)) - {"MAX_STORE", "REQUEST_ID", names.ANSWERS}
    assert {name for name in settings if name.lower() not in fields} == set()
