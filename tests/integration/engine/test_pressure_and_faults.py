"""What happens when the KV cache is too small for all, and when the generation thread dies: engines of their own."""

import asyncio
import threading
from pathlib import Path

import pytest

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.events import Tokens
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers import memory
from forebay_inference.engine.transformers.engine import TransformersEngine
from forebay_inference.health import EngineWatch
from support.engine import answer, chat, completion

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 6 pages of 32 tokens of the default model, two of them the library's own."""
    monkeypatch.setattr(memory, "cache_budget", lambda device: 6 * 32 * 23_040)


async def started(data_dir: Path) -> TextModel:
    settings = InferenceSettings(
        _env_file=None, data_dir=data_dir, model_quantization="none", max_concurrent_requests=8, llm_batch_size=64
    )
    engine = TextModel(TransformersEngine(settings))
    info = await engine.start(lambda line: None)
    assert info.quantization == "none"
    return engine


async def test_pressure_waits_and_kills_nothing(small_cache: None, data_dir: Path) -> None:
    engine = await started(data_dir)
    try:
        prompts = [f"Number {number}: " + "word " * 40 for number in range(4)]
        requests = [completion(prompt, max_tokens=40, ignore_eos=True) for prompt in prompts]
        found = await asyncio.gather(*(answer(engine, request) for request in requests))
        assert [len(one.tokens) for one in found] == [40] * 4
        assert engine.status().fault is None
        # The context is what the cache can hold, so that nothing is accepted that can never run.
        with pytest.raises(InvalidRequest, match="maximum context length is 128 tokens"):
            await answer(engine, completion("word " * 200, max_tokens=1))
        whole = await answer(engine, completion("word", max_tokens=127, ignore_eos=True))
        assert len(whole.tokens) == 127
    finally:
        await engine.close()


async def test_a_dead_generation_thread_fails_its_requests_and_says_why(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await started(data_dir)
    try:
        runner = engine.engine._batch._manager.batch_processor.model_runner

        def out_of_memory(*_: object) -> None:
            raise MemoryError("no more")

        requests = [asyncio.ensure_future(answer(engine, chat(max_tokens=500, ignore_eos=True))) for _ in range(3)]
        generator = engine.generate(chat(max_tokens=500, ignore_eos=True), {})
        async for event in generator:
            if isinstance(event, Tokens):
                monkeypatch.setattr(runner, "compute_batch", out_of_memory)
                break
        with pytest.raises(EngineFault):
            async for _ in generator:
                pass
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineFault] * 3
        async with asyncio.timeout(60):
            while not (engine.status().fault or "").startswith("MemoryError"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert engine.status().fault == "MemoryError in the generation thread"
        with pytest.raises(EngineFault, match="serves nothing"):
            await answer(engine, chat())
    finally:
        await engine.close()


async def test_a_forward_pass_that_never_ends_is_found(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await started(data_dir)
    go_on = threading.Event()
    try:
        runner = engine.engine._batch._manager.batch_processor.model_runner
        compute = runner.compute_batch

        def hang(*args: object, **kwargs: object) -> object:
            go_on.wait()
            return compute(*args, **kwargs)

        watch = EngineWatch(engine, stall_timeout_s=2)
        request = asyncio.ensure_future(answer(engine, chat(max_tokens=4, ignore_eos=True)))
        assert len((await request).tokens) == 4
        for _ in range(5):
            watch.look()  # idle
        assert watch.fault() is None
        monkeypatch.setattr(runner, "compute_batch", hang)
        request = asyncio.ensure_future(answer(engine, chat(max_tokens=4, ignore_eos=True)))
        while engine.status().sequences == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(4):
            watch.look()
        assert watch.fault() == "no step in 2 s with requests in the batch"
        go_on.set()
        assert len((await request).tokens) == 4
        watch.look()
        assert watch.fault() is None
    finally:
        go_on.set()
        await engine.close()


async def test_closing_fails_what_still_runs(data_dir: Path) -> None:
    engine = await started(data_dir)
    running = asyncio.ensure_future(answer(engine, chat(max_tokens=4000, ignore_eos=True)))
    steps = engine.status().steps
    while engine.status().steps == steps:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(EngineFault):
        await running
    with pytest.raises(EngineFault, match="closed"):
        await answer(engine, chat())
