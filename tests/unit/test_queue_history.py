"""The last hour: what a sample has, what is marked, and that all of it is bounded."""

from typing import Any

from forebay_api.watching import history
from forebay_api.watching.history import History, columns
from forebay_contracts.queueing.status import ModelQueue, QueueStatus
from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from support.twins import worker_info


def status(*models: ModelQueue, **fields: Any) -> QueueStatus:
    names = QueueStatus.model_fields.keys() - {"models", "is_running", "differences"}
    return QueueStatus(**{**dict.fromkeys(names, 0), "is_running": True, "models": models, **fields})


def line(model: str = "m", **fields: Any) -> ModelQueue:
    given = {"waiting": 1, "processing": 2, "max_concurrent": 4, "delivered": 0, "paused_until": None, "deferred": 3}
    return ModelQueue(**{"model": model, "consumer": model, **given, **fields})


class Queue:
    """A queue whose numbers a test sets."""

    def __init__(self) -> None:
        self.status: QueueStatus | None = status()
        self.workers: list[WorkerInfo] = []
        self.history = History(self.numbers, lambda: self.workers, self.usage)

    async def numbers(self) -> QueueStatus:
        if self.status is None:
            raise QueueUnavailable("away")
        return self.status

    async def usage(self) -> list[UsageRow]:
        return []

    async def sampled(self, now: QueueStatus | None, *workers: WorkerInfo) -> list[str]:
        """The marks after another sample."""
        self.status, self.workers = now, list(workers)
        await self.history.sample()
        return [mark["what"] for mark in self.history.marks]


async def test_what_changed_between_two_samples_is_marked() -> None:
    queue, one = Queue(), worker_info("one", 1)
    limited = status(line(), max_queue_size=9)
    assert await queue.sampled(limited, one) == []
    assert await queue.sampled(limited, one, worker_info("two", 1)) == ["worker_joined"]
    draining = worker_info("two", 1).model_copy(update={"status": WorkerStatus.DRAINING})
    await queue.sampled(limited, one, draining)
    assert (await queue.sampled(limited, one))[1:] == ["worker_left"]
    assert (await queue.sampled(limited))[2:] == ["worker_lost"]
    assert (await queue.sampled(status(line(max_concurrent=8), max_queue_size=9)))[3:] == ["limit_changed"]
    assert (await queue.sampled(status(line(max_concurrent=8, paused_until=9.0), max_queue_size=5)))[4:] == [
        "paused",
        "limit_changed",
    ]
    for _ in range(2):
        assert (await queue.sampled(None))[6:] == ["nats_away"]
    assert (await queue.sampled(limited))[7] == "nats_back"
    assert queue.history.marks[3]["text"] == "MAX_CONCURRENT_REQUESTS of m: 4 → 8"


async def test_columns_are_null_where_nothing_is_known() -> None:
    queue = Queue()
    await queue.sampled(status(line("a"), queue_size=1, total_processed=7))
    await queue.sampled(None)
    await queue.sampled(status(line("b")))
    found = columns(list(queue.history.samples))
    assert (found["waiting"], found["completed"]) == ([1, None, 0], [7, None, 0])
    assert found["models"]["a"] == {
        "waiting": [1, None, None],
        "processing": [2, None, None],
        "deferred": [3, None, None],
    }
    assert found["models"]["b"]["waiting"] == [None, None, 1]


async def test_it_is_bounded() -> None:
    queue = Queue()
    many = status(*(line(f"m{number}", waiting=number) for number in range(100)))
    for _ in range(400):
        await queue.sampled(many, worker_info("w", 1))
        await queue.sampled(many)
    assert len(queue.history.samples) == history.SECONDS / history.SAMPLE_S == 360
    assert set(queue.history.samples[-1].models) == {f"m{number}" for number in range(68, 100)}
    assert len(queue.history.marks) == history.MAX_MARKS


def test_usage_is_what_was_added_since_the_sample_before() -> None:
    kept = Queue().history
    rows = [UsageRow(day="1", model="m", key=key, requests=5, prompt_tokens=10) for key in ("a", None)]
    kept._note_usage(rows)
    assert not kept.used
    more = rows[0].model_copy(update={"requests": 7, "completion_tokens": 4})
    kept._note_usage([more, rows[1], UsageRow(day="2", model="m", key="b", requests=1, prompt_tokens=3)])
    assert kept.used[0].rows == {("m", "a"): (2, 4, 0.0), ("m", "b"): (1, 3, 0.0)}
