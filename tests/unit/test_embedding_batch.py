"""How embedding requests share forward passes: in turn, within the budget, and each with a definite end."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from forebay_inference.engine.embedding.batch import MAX_FAILURES_IN_A_ROW, EmbeddingBatch, Job
from forebay_inference.engine.protocol import EngineFault


class Passes:
    """Computes what can be checked (the first token of each input), and remembers every pass."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []
        self.go = threading.Event()
        self.begun = threading.Event()
        self.fail = False
        self.go.set()

    def __call__(self, batch: list[list[int]]) -> list[bytes]:
        self.begun.set()
        assert self.go.wait(10)
        self.sizes.append([len(tokens) for tokens in batch])
        if self.fail:
            raise RuntimeError("ordered to fail")
        return [bytes([tokens[0]]) for tokens in batch]


@pytest.fixture
def passes() -> Passes:
    return Passes()


@pytest_asyncio.fixture
async def batch(passes: Passes) -> AsyncIterator[EmbeddingBatch]:
    batch = EmbeddingBatch(passes, 10, asyncio.get_running_loop())
    batch.start()
    yield batch
    passes.go.set()
    await asyncio.to_thread(batch.stop)


async def hold(batch: EmbeddingBatch, passes: Passes) -> Job:
    """Keep the thread in a pass, so that what is submitted meanwhile is found together."""
    passes.go.clear()
    passes.begun.clear()
    first = Job({0: [9]})
    batch.submit(first)
    await asyncio.to_thread(passes.begun.wait, 10)
    return first


async def submit_until_refused(batch: EmbeddingBatch) -> None:
    while True:
        batch.submit(Job({}))
        await asyncio.sleep(0)


async def vectors(job: Job) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while job.unfinished:
        found.update(await job.next_vectors())
    return found


async def test_every_input_gets_its_own_vector(batch: EmbeddingBatch) -> None:
    jobs = [Job({index: [10 * number + index] * (index + 1) for index in range(5)}) for number in range(4)]
    for job in jobs:
        batch.submit(job)
    for number, found in enumerate(await asyncio.gather(*map(vectors, jobs))):
        assert found == {index: bytes([10 * number + index]) for index in range(5)}


async def test_passes_keep_within_the_budget_padding_included(batch: EmbeddingBatch, passes: Passes) -> None:
    await hold(batch, passes)
    job = Job(dict(enumerate([[1] * length for length in (1, 5, 5, 4, 25, 2, 2, 3)])))
    batch.submit(job)
    passes.go.set()
    await vectors(job)
    assert passes.sizes == [[1], [25], [5, 5], [4, 3], [2, 2, 1]]


async def test_requests_are_served_in_turn(batch: EmbeddingBatch, passes: Passes) -> None:
    await hold(batch, passes)
    large, small = Job({index: [1] * 5 for index in range(100)}), Job({0: [2] * 5})
    batch.submit(large)
    batch.submit(small)
    passes.go.set()
    assert await vectors(small) == {0: b"\x02"}
    assert large.unfinished >= 90
    assert len(await vectors(large)) == 100


async def test_a_cancelled_request_is_not_computed_further(batch: EmbeddingBatch, passes: Passes) -> None:
    await hold(batch, passes)
    job, other = Job({index: [1] * 5 for index in range(100)}), Job({0: [2]})
    batch.submit(job)
    batch.cancel(job)
    batch.cancel(job)
    batch.submit(other)
    passes.go.set()
    await vectors(other)
    assert passes.sizes == [[1], [1]]


async def test_a_failed_pass_fails_its_requests_alone(batch: EmbeddingBatch, passes: Passes) -> None:
    first = await hold(batch, passes)
    passes.fail = True
    passes.go.set()
    with pytest.raises(EngineFault, match="a forward pass failed"):
        await vectors(first)
    assert batch.status().fault is None
    passes.fail = False
    job = Job({0: [7]})
    batch.submit(job)
    assert await vectors(job) == {0: b"\x07"}


async def test_failures_in_a_row_break_the_engine(batch: EmbeddingBatch, passes: Passes) -> None:
    passes.fail = True
    waiting = [Job({index: [1] * 10 for index in range(3)}) for _ in range(MAX_FAILURES_IN_A_ROW + 1)]
    await hold(batch, passes)
    for job in waiting:
        batch.submit(job)
    passes.go.set()
    for job in waiting:
        with pytest.raises(EngineFault):
            await vectors(job)
    assert batch.status().fault == f"{MAX_FAILURES_IN_A_ROW} forward passes in a row failed"
    with pytest.raises(EngineFault, match="the engine serves nothing"):
        batch.submit(Job({0: [1]}))


async def test_stopping_fails_what_waits(batch: EmbeddingBatch, passes: Passes) -> None:
    running = await hold(batch, passes)
    waiting = Job({0: [1] * 10})
    batch.submit(waiting)
    stopping = asyncio.create_task(asyncio.to_thread(batch.stop))
    with pytest.raises(EngineFault, match="closed"):
        await submit_until_refused(batch)
    passes.go.set()
    await stopping
    assert await vectors(running) == {0: b"\x09"}
    with pytest.raises(EngineFault, match="the engine was closed"):
        await vectors(waiting)


async def test_a_request_without_anything_left_to_do_ends_at_once(batch: EmbeddingBatch, passes: Passes) -> None:
    job = Job({})
    batch.submit(job)
    assert await vectors(job) == {}
    assert passes.sizes == []
