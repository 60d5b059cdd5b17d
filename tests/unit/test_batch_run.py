"""A batch on the in-memory twins: what is written, whatever happens while it runs."""

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest

from forebay_api.batches.output import Output
from forebay_api.batches.owned import OwnedRecord
from forebay_api.batches.run import Run
from forebay_api.clients.keys import ANYBODY
from forebay_api.openai.batches.routes import cancel_batch
from forebay_contracts.queueing.protocols import Superseded
from forebay_contracts.wire.errors import DailyTokensSpent, InvalidRequest, QueueConflict
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus
from support.batches import batched, line
from support.twins import Twins, twins


@pytest.fixture(autouse=True)
def _reports_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.batches.run.REPORT_S", 0.02)


DEEP = b'{"metadata": ' + 300 * b'{"a":' + b"1" + 300 * b"}" + b", "
SLOW = "tokens=5 delay_ms=20"


def words(count: int) -> str:
    return " ".join(f"t{token}" for token in range(count))


def done(made: Twins) -> int:
    """How many requests have been answered."""
    return sum(state.status is RequestStatus.COMPLETED for state in made.states.history)


def answers(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in lines}


async def test_each_line_is_answered_once_and_its_answer_leaves_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.in_flight.carried.WRITTEN_S", 0.0)
    monkeypatch.setattr("forebay_api.in_flight.carried.END_KEPT_S", 0.0)
    async with twins() as made, batched(made) as batches:
        made.worker()
        data = b"".join(line(f"r{number}", f"tokens={number % 3 + 1}") for number in range(30))
        ended = await batches.ends(await batches.create(data, window=7))
        output = await batches.lines(ended.output_file_id)
        assert ended.status == "completed"
        assert (ended.total, ended.completed, ended.failed, ended.error_file_id) == (30, 30, 0, None)
        assert ended.usage.completion_tokens == 60
        assert answers(output) == {f"r{number}": words(number % 3 + 1) for number in range(30)}
        assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in output)
        for one in output[:-10]:  # those of the last part go with the next one
            assert not await made.answers.read(one["response"]["request_id"])
        statuses = [record.status for record in batches.batches.history]
        assert list(dict.fromkeys(statuses)) == ["validating", "in_progress", "finalizing", "completed"]


async def test_wrong_lines_go_into_the_error_file() -> None:
    wrong = {
        "invalid_json_line": [b"no json\n", b"[]\n", line("deep").replace(b'{"model', DEEP + b'"model')],
        "missing_required_parameter": [b'{"method":"POST"}\n', b'{"custom_id":"b","method":"POST","url":"%s"}\n'],
        "invalid_method": [line("get", method="GET")],
        "invalid_url": [line("url", url="/v1/embeddings")],
        "duplicate_custom_id": [line("good")],
    }
    data = line("good") + b"\r\n" + b"".join(one for some in wrong.values() for one in some)
    data = data.replace(b"%s", b"/v1/chat/completions")
    bodies = {"model": {"model": "other"}, "stream": {"stream": True}, "store": {"store": True}, "n": {"n": 0}}
    data += b"".join(line(name, **body) for name, body in bodies.items()) + line("fails", "tokens=1 fail")
    async with twins(max_deliveries=1) as made, batched(made) as batches:
        made.worker()
        ended = await batches.ends(await batches.create(data))
        errors = await batches.lines(ended.error_file_id)
        assert (ended.status, ended.completed, ended.failed) == ("completed", 1, len(errors))
        codes = Counter(one["error"]["code"] for one in errors if one["response"] is None)
        assert codes == {code: len(some) for code, some in wrong.items()}
        refused = {one["custom_id"]: one["response"] for one in errors if one["response"] is not None}
        assert {name: one["status_code"] for name, one in refused.items()} == {
            **dict.fromkeys(("stream", "store", "n"), 400),
            "model": 404,
            "fails": 500,
        }
        assert all(one["body"]["error"]["param"] == name for name, one in refused.items() if name != "fails")


@pytest.mark.parametrize(
    ("data", "code"), [(b"", "empty_file"), (b"\n \n", "empty_file"), (b"%PDF-1.4\n\x00\xff\n", "invalid_json_line")]
)
async def test_a_file_without_a_request_fails_the_batch(data: bytes, code: str) -> None:
    async with twins() as made, batched(made) as batches:
        ended = await batches.ends(await batches.create(data))
        assert (ended.status, ended.output_file_id) == ("failed", None)
        assert ended.errors[0].code == code
        assert ended.object()["errors"]["data"][0]["code"] == code


async def test_others_have_their_turn_while_a_file_is_validated() -> None:
    async with twins() as made, batched(made) as batches:
        running = batches.run(await batches.create(b"no json\n" * 2_000))
        turns = 0
        while not running.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 2_000 / 50


async def test_too_many_lines_fail_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.batches.lines.MAX_LINES", 2)
    async with twins() as made, batched(made) as batches:
        ended = await batches.ends(await batches.create(b"no json\n" + line("a") + line("b")))
        assert (ended.status, ended.errors[0].code, ended.error_file_id) == ("failed", "too_many_requests", None)


async def test_another_run_goes_on_where_the_first_was_ended() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker(slots=3)
        data = b"".join(line(f"r{number}", "tokens=2 delay_ms=5") for number in range(40))
        record = await batches.create(data, window=6)
        for turn in range(3):
            first = batches.run(record, f"run-{turn}")
            while (await batches.record(record)).run != f"run-{turn}":  # noqa: ASYNC110 - a record tells nobody that it has changed
                await asyncio.sleep(0)
            while done(made) < 10 * (turn + 1):  # noqa: ASYNC110 - in the middle of it
                await asyncio.sleep(0.005)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        ended = await batches.ends(record)
        output = await batches.lines(ended.output_file_id)
        assert (ended.status, ended.completed, ended.failed) == ("completed", 40, 0)
        assert Counter(one["custom_id"] for one in output) == {f"r{number}": 1 for number in range(40)}
        assert set(answers(output).values()) == {words(2)}
        ends = Counter(state.id for state in made.states.history if state.status is RequestStatus.COMPLETED)
        assert (len(ends), set(ends.values())) == (40, {1})


async def test_a_part_that_was_not_written_to_its_end_is_removed() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker()
        record = await batches.create(line("a") + line("b"))
        nuid = f"batch-{record.id.removeprefix('batch_')}-output"
        await batches.files.append(nuid, b'{"half', 0, 1)
        ended = await batches.ends(record)
        assert set(answers(await batches.lines(ended.output_file_id))) == {"a", "b"}


async def test_after_a_takeover_the_earlier_run_writes_into_neither_file(monkeypatch: pytest.MonkeyPatch) -> None:
    async with twins() as made, batched(made) as batches:
        record = await batches.create(line("a"))
        first, second = Output(batches.files, record), Output(batches.files, record)  # type: ignore[arg-type]
        await first.add("output", 1, b"one\n")
        read = batches.files.read

        async def read_and_then_written(nuid: str, after: int = 0) -> Any:
            async for page in read(nuid, after):
                yield page
            if nuid.endswith("output") and not first.has(2):
                await first.add("output", 2, b"two\n")

        monkeypatch.setattr(batches.files, "read", read_and_then_written)
        await second.take_over()
        assert (second.has(1), second.has(2), second.completed) == (True, True, 2)
        for kind in ("output", "error"):
            with pytest.raises(QueueConflict):
                await first.add(kind, 3, b"three\n")
        await second.add("error", 3, b"3\n")
        files = {kind: await batches.files.get(name) for kind, name in (await second.finish()).items()}
        assert {kind: file.size for kind, file in files.items() if file is not None} == {"output": 8, "error": 2}


async def test_of_two_runs_one_gives_up() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker(slots=2)
        record = await batches.create(b"".join(line(f"r{number}", SLOW) for number in range(10)))
        first = batches.run(record, "first")
        while (await batches.record(record)).status != "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0)
        ended = await batches.ends(record)
        with pytest.raises(Superseded):
            await first
        output = await batches.lines(ended.output_file_id)
        assert Counter(one["custom_id"] for one in output) == {f"r{number}": 1 for number in range(10)}


async def test_a_cancelled_batch_keeps_what_it_has() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker(slots=2)
        data = b"".join(line(f"r{number}", SLOW) for number in range(30))
        record = await batches.create(data, window=4)
        running = batches.run(record)
        while (await batches.record(record)).completed == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        kept = await batches.batches.get(record.id)
        assert kept is not None
        await batches.batches.put(kept.record.to("cancelling"), kept.revision)
        await running
        ended = await batches.record(record)
        assert ended.status == "cancelled"
        assert ended.object()["cancelled_at"] >= ended.object()["cancelling_at"]
        output, errors = await batches.lines(ended.output_file_id), await batches.lines(ended.error_file_id)
        assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
        assert Counter(one["custom_id"] for one in output + errors) == {f"r{number}": 1 for number in range(30)}
        await made.empty()


async def test_a_batch_that_is_cancelled_before_it_runs_has_its_event() -> None:
    async with twins() as made, batched(made) as batches:
        record = await batches.create(line())
        assert (await cancel_batch(record.id, batches.context, ANYBODY))["status"] == "cancelled"
        assert batches.batches.announced == [(record.id, "cancelled")]
        with pytest.raises(InvalidRequest, match="cannot be cancelled"):
            await cancel_batch(record.id, batches.context, ANYBODY)


async def test_an_expired_batch_keeps_what_it_has() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker(slots=1)
        data = line("done") + b"".join(line(f"r{number}", "tokens=100 delay_ms=100") for number in range(10))
        ended = await batches.ends(await batches.create(data, window=3, expires_in_s=3))
        assert (ended.status, ended.completed, ended.failed) == ("expired", 1, 10)
        errors = await batches.lines(ended.error_file_id)
        assert {one["error"]["code"] for one in errors} == {"batch_expired"}
        assert ended.object()["expired_at"] is not None
        assert batches.batches.announced == [(ended.id, "expired")]


@pytest.mark.parametrize(("status", "reason"), [("expired", "batch_expired"), ("cancelled", "batch_cancelled")])
async def test_a_batch_that_stops_before_it_was_validated(status: str, reason: str) -> None:
    async with twins() as made, batched(made) as batches:
        record = await batches.create(b"no json\n" + line("a"), expires_in_s=-1 if status == "expired" else 60)
        if status == "cancelled":
            kept = await batches.batches.get(record.id)
            assert kept is not None
            await batches.batches.put(kept.record.to("cancelling", run="another"), kept.revision)
        ended = await batches.ends(record)
        errors = await batches.lines(ended.error_file_id)
        assert (ended.status, [one["error"]["code"] for one in errors]) == (status, ["invalid_json_line", reason])


async def test_a_run_that_was_slow_to_begin_finds_the_one_before_it() -> None:
    async with twins() as made, batched(made) as batches:
        made.worker(slots=2)
        record = await batches.create(b"".join(line(f"r{number}", SLOW) for number in range(8)), window=2)
        kept = await batches.batches.get(record.id)
        assert kept is not None
        first = batches.run(record, "first")
        while (await batches.record(record)).completed == 0:  # noqa: ASYNC110
            await asyncio.sleep(0)
        with contextlib.suppress(QueueConflict):
            await Run(batches.context, kept, "second").run()
        with pytest.raises((Superseded, QueueConflict)):
            await first
        ended = await batches.ends(record)
        output = await batches.lines(ended.output_file_id)
        assert Counter(one["custom_id"] for one in output) == {f"r{number}": 1 for number in range(8)}
        assert (ended.completed, ended.failed) == (8, 0)


async def test_a_record_that_was_read_before_the_last_change_is_left_out() -> None:
    async with twins() as made, batched(made) as batches:
        kept = await batches.batches.get((await batches.create(line())).id)
        assert kept is not None
        owned = OwnedRecord(batches.context.batches, kept, "run")
        await owned.claim()
        claimed = await batches.batches.get(kept.record.id)
        await owned.save(lambda record: record.to("cancelling"))
        batches.batches._kept[kept.record.id] = claimed  # type: ignore[assignment]
        await owned.read()
        assert owned.cancelled


async def test_a_key_that_has_used_its_tokens_makes_it_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.batches.run.RETRY_S", 0.01)
    asked: list[str | None] = []

    def check(key: str | None) -> None:
        asked.append(key)
        if len(asked) < 3:
            raise DailyTokensSpent("no tokens are left", 60)

    async with twins() as made, batched(made) as batches:
        made.worker()
        batches.context.limits.check_tokens = check
        ended = await batches.ends(await batches.create(line()))
        assert (ended.completed, len(asked)) == (1, 3)


async def test_a_full_queue_makes_it_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.batches.run.RETRY_S", 0.01)
    monkeypatch.setattr("forebay_api.batches.output.RETRY_S", 0.01)
    async with twins(max_queue_size=2) as made, batched(made) as batches:
        made.worker(slots=1)
        made.answers.room, batches.files.full = False, True
        record = await batches.create(b"".join(line(f"r{number}") for number in range(12)))
        running = batches.run(record)
        await asyncio.sleep(0.1)
        assert (await batches.record(record)).completed == 0
        made.answers.room = True
        await asyncio.sleep(0.1)
        batches.files.full = False
        await running
        assert (await batches.record(record)).completed == 12


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_the_input_file_is_gone(status: str) -> None:
    async with twins() as made, batched(made) as batches:
        record = await batches.create(line("a", "delay_ms=10000") + line("b", "delay_ms=10000"))
        first = batches.run(record)
        while len(made.queue.room.waiting) < 2:  # noqa: ASYNC110 - a room tells no test
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        for number in (1, 2):
            await made.reaches(str(record.named(str(number))), RequestStatus.QUEUED)
        batches.files.files.clear()
        if status == "cancelled":
            kept = await batches.batches.get(record.id)
            assert kept is not None
            await batches.batches.put(kept.record.to("cancelling"), kept.revision)
        ended = await batches.ends(record)
        assert (ended.status, ended.errors[0].param) == (status, "input_file_id")
        assert not made.queue.room.waiting


async def test_answers_are_not_read_while_much_is_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.batches.output.MAX_WAITING_BYTES", 0)
    monkeypatch.setattr("forebay_api.batches.output.RETRY_S", 0.01)
    async with twins() as made, batched(made) as batches:
        made.worker()
        batches.files.full = True
        record = await batches.create(b"".join(line(f"r{number}") for number in range(12)), window=12)
        read: list[str] = []
        whole = batches.context.carried.whole

        async def counted(request: InferenceRequest) -> Any:
            read.append(request.id)
            return await whole(request)

        batches.context.carried.whole = counted
        running = batches.run(record)
        for number in range(1, 13):
            await made.reaches(str(record.named(str(number))), RequestStatus.COMPLETED)
        await asyncio.sleep(0.2)  # nothing tells that nothing happens
        assert len(read) < 9
        batches.files.full = False
        await running
        assert (await batches.record(record)).completed == 12
