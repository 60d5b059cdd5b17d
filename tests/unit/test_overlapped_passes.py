"""The batch as on a GPU, where a pass starts before the tokens of the last are known; and out of memory in a pass."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager

from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import EngineFault, LoadedModel, Step, TokenRequest
from forebay_inference.engine.transformers import memory
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.overlapped import tiny_engine

SAMPLINGS = (
    Sampling(temperature=0),
    Sampling(logprobs=2),
    Sampling(top_p=0.8, top_k=40, frequency_penalty=0.7, repetition_penalty=1.2),
    Sampling(temperature=0, presence_penalty=1.0, min_tokens=8, logprobs=0),
)


def requests(loaded: LoadedModel, count: int = 12) -> list[TokenRequest]:
    prompts = [loaded.tokenizer.encode(f"{number}: " + "tell me more " * number) for number in range(6)]
    grammars = [None, None, None, None, loaded.compile("start: /[a-z]{5,9}/"), loaded.compile('start: "a" | "bcd"')]
    samplings = (*SAMPLINGS, Sampling(logprobs=1), Sampling(temperature=0))
    return [
        TokenRequest(f"r{n}", prompt, count, sampling, str(n), grammar, end_tokens=loaded.end_tokens)
        for n, (prompt, sampling, grammar) in enumerate(zip(prompts, samplings, grammars, strict=True))
    ]


async def steps(engine: TransformersEngine, request: TokenRequest) -> list[Step]:
    return [step._replace(cached_tokens=0) async for step in engine.generate(request)]


async def answered(folder: Path, *, two_passes: bool) -> list[list[Step]]:
    engine, loaded = await tiny_engine(folder, two_passes=two_passes)
    try:
        return await asyncio.gather(*(steps(engine, request) for request in requests(loaded)))
    finally:
        await engine.close()


def tokens(found: list[Step]) -> list[int]:
    return [token for step in found for token in step.tokens]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[Step]]:
    """The answers by passes one after another."""
    return await answered(tmp_path_factory.mktemp("model"), two_passes=False)


async def test_overlapped_passes_answer_as_passes_one_after_another(tmp_path: Path, expected: list[list[Step]]) -> None:
    found = await answered(tmp_path, two_passes=True)
    assert [tokens(one) for one in found] == [tokens(one) for one in expected]
    assert [one[-1].finish for one in found] == [one[-1].finish for one in expected]
    for one, other in zip(found, expected, strict=True):
        for step, right in zip(one, other, strict=True):
            assert [entry.token for entry in step.logprobs] == [entry.token for entry in right.logprobs]
            assert [entry.logprob for entry in step.logprobs] == pytest.approx(
                [entry.logprob for entry in right.logprobs], abs=1e-3
            )


async def test_a_sequence_taken_out_of_a_full_cache_goes_on_as_it_would_have(
    tmp_path: Path, expected: list[list[Step]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 pages of 32 tokens for six sequences of up to three; two are the library's own.
    monkeypatch.setattr(memory, "cache_budget", lambda device: 6 * 32 * 2 * 2 * 2 * 16 * 4)
    engine, loaded = await tiny_engine(tmp_path, two_passes=True)
    try:
        assert engine._batch is not None
        offloading, taken_out = engine._batch._manager.batch_processor.offloading_manager, []
        take_out = offloading.offload_requests
        offloading.offload_requests = lambda: taken_out.append(found := take_out()) or found
        found = await asyncio.gather(*(steps(engine, request) for request in requests(loaded)))
        assert any(taken_out)
        assert [tokens(one) for one in found] == [tokens(one) for one in expected]
        assert engine.status().fault is None
    finally:
        await engine.close()


@pytest.mark.parametrize("two_passes", [False, True])
async def test_out_of_memory_fails_the_sequences_of_its_pass_alone(tmp_path: Path, two_passes: bool) -> None:
    engine, loaded = await tiny_engine(tmp_path, two_passes=two_passes)
    try:
        assert engine._batch is not None
        processor = engine._batch._manager.batch_processor
        runner, active = processor.model_runner, processor.scheduler.active_requests
        compute = runner.compute_batch

        def run_out(*arguments: Any) -> None:
            if [bool(state.generated_tokens) for state in active.values()] == [True, True]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            compute(*arguments)

        runner.compute_batch = run_out
        first, *others = requests(loaded)
        outcomes = await asyncio.gather(steps(engine, first), steps(engine, others[2]), return_exceptions=True)
        assert [str(one) for one in outcomes] == ["the GPU ran out of memory in a forward pass"] * 2
        assert {type(one) for one in outcomes} == {EngineFault}
        assert (engine.status().fault, engine.status().sequences) == (None, 0)
        runner.compute_batch = compute
        # The same again, in a batch that goes on.
        assert len(tokens(await steps(engine, first))) == 12
    finally:
        await engine.close()


async def test_memory_that_another_process_has_taken_meanwhile_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", run_out)
    with pytest.raises(
        ConfigurationError, match=r"does another process use cpu\? \(CUDA out of memory. Tried .*GiB.\)$"
    ):
        await tiny_engine(tmp_path)
