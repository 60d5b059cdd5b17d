"""What the text layer may expect of every engine. A further engine is one more `_subject`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import (
    Engine,
    EngineFault,
    GrammarError,
    LoadedModel,
    Scorer,
    Step,
    TokenLogprob,
    TokenRequest,
)
from forebay_inference.engine.simulated import SimulatedEngine
from support.gguf import write_tiny_gguf, write_tiny_lora
from support.lora import write_lora
from support.overlapped import tiny_engine
from support.served import kill_server, llama_cpp_engine
from support.vllm import vllm_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = Sampling(temperature=0)
# An engine may draw otherwise where the client gives no seed.
SEEDED = Sampling(seed=1)
ADAPTERS = ("red", "blue")


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine that has started. `prompt` is answered with at least 40 tokens, by the seed where it is sampled."""

    engine: Engine
    loaded: LoadedModel
    prompt: str
    break_down: Callable[[], str]
    """Makes the next passes fail; returns a prompt that is to fail in them."""

    def request(self, **fields: Any) -> TokenRequest:
        prompt = self.loaded.tokenizer.encode(fields.pop("text", self.prompt))
        given: dict[str, Any] = {"max_new_tokens": 12, "sampling": SEEDED, "seed": "1", **fields}
        return TokenRequest("r", prompt, **given)

    async def steps(self, **fields: Any) -> list[Step]:
        found = [step async for step in self.engine.generate(self.request(**fields))]
        assert [step.finish for step in found[:-1]] == [None] * (len(found) - 1)
        assert found[-1].finish is not None
        return found

    async def tokens(self, **fields: Any) -> list[int]:
        return [token for step in await self.steps(**fields) for token in step.tokens]


async def simulated(folder: Path) -> Subject:
    engine = SimulatedEngine(ADAPTERS)
    loaded = await engine.start(lambda line: None)
    return Subject(engine, loaded, "[[random tokens=1000]]", lambda: "[[tokens=1 fail]]")


async def transformers(folder: Path, *, two_passes: bool = False) -> Subject:
    engine, loaded = await tiny_engine(folder, two_passes=two_passes)

    def break_down() -> str:
        assert engine._batch is not None
        runner = engine._batch._manager.batch_processor.model_runner

        def out_of_memory(*_: object) -> None:
            raise MemoryError

        runner.compute_batch = out_of_memory
        return "any"

    return Subject(engine, loaded, "Once upon a time", break_down)


async def llamacpp(folder: Path) -> Subject:
    adapters = {name: str(write_tiny_lora(folder / f"{name}.gguf", seed)) for seed, name in enumerate(ADAPTERS)}
    engine = llama_cpp_engine(write_tiny_gguf(folder / "tiny.gguf"), slots=6, model_adapters=adapters)
    loaded = await engine.start(lambda line: None)

    def break_down() -> str:
        kill_server(engine)
        return "any"

    return Subject(engine, loaded, "Once upon a time", break_down)


async def vllm(folder: Path, *names: str) -> Subject:
    # float32, so that no rounding decides between two tokens.
    adapters = {name: str(write_lora(folder / name, seed)) for seed, name in enumerate(names)}
    engine = vllm_engine("--dtype=float32", max_concurrent_requests=8, model_adapters=adapters)
    loaded = await engine.start(lambda line: None)
    return Subject(engine, loaded, "Once upon a time", lambda: "")


SUBJECTS: dict[str, Callable[[Path], Awaitable[Subject]]] = {
    "simulated": simulated,
    "transformers": transformers,
    "transformers, two passes at once": partial(transformers, two_passes=True),
    "llamacpp": llamacpp,
}
# Only `make test-vllm` has it. It starts for a minute, so no test breaks it here; those of tests/vllm do.
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])
VLLM_WITH_ADAPTERS = pytest.param("vllm, adapters", marks=VLLM.marks)
REAL: dict[str, Callable[[Path], Awaitable[Subject]]] = {
    "vllm": vllm,
    "vllm, adapters": lambda folder: vllm(folder, *ADAPTERS),
}
SCORERS = [*(name for name in SUBJECTS if name != "llamacpp"), VLLM]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[*SUBJECTS, VLLM])
async def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    started = await (SUBJECTS | REAL)[request.param](tmp_path_factory.mktemp("model"))
    yield started
    await started.engine.close()


@pytest_asyncio.fixture(loop_scope="module", params=SUBJECTS)
async def own(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    """An engine that the test may break or close."""
    started = await SUBJECTS[request.param](tmp_path)
    yield started
    await started.engine.close()


async def comes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_max_new_tokens_end_a_sequence(subject: Subject) -> None:
    for count in (1, 12):
        found = await subject.steps(max_new_tokens=count)
        assert sum(len(step.tokens) for step in found) == count
        assert found[-1].finish == "length"


async def test_an_end_token_ends_a_sequence_and_is_among_its_tokens(subject: Subject) -> None:
    tokens = await subject.tokens()
    end = tokens[5]
    found = await subject.steps(end_tokens=frozenset({end}))
    assert [token for step in found for token in step.tokens] == tokens[: tokens.index(end) + 1]
    assert found[-1].finish == "stop"


async def test_draws_depend_on_the_seed_alone(subject: Subject) -> None:
    found = await asyncio.gather(
        *(subject.tokens(seed=seed) for seed in ("1", "1", "2")),
        subject.tokens(sampling=Sampling(temperature=0)),
        subject.tokens(sampling=Sampling(temperature=0), seed="3"),
    )
    assert found[0] == found[1] != found[2]
    assert found[3] == found[4]


async def test_a_sequence_is_the_same_alone_and_among_others(subject: Subject) -> None:
    requests = [{"seed": str(seed)} for seed in range(6)]
    alone = [await subject.tokens(**request) for request in requests]
    assert await asyncio.gather(*(subject.tokens(**request) for request in requests)) == alone


@pytest.mark.parametrize("kept", [1, 6, 11])
async def test_a_resume_goes_on_as_declared(subject: Subject, kept: int) -> None:
    sampled = Sampling(frequency_penalty=0.5, repetition_penalty=1.1)
    exact = [GREEDY, sampled] if subject.engine.capabilities.resumes == "exact" else [GREEDY]
    for sampling in exact:
        whole = await subject.tokens(sampling=sampling)
        rest = await subject.tokens(sampling=sampling, generated=whole[:kept], max_new_tokens=12 - kept)
        assert whole[:kept] + rest == whole


async def test_logprobs_are_of_the_chosen_and_the_best(subject: Subject) -> None:
    assert subject.engine.capabilities.logprobs
    for step in await subject.steps(sampling=Sampling(temperature=0, logprobs=3)):
        assert [entry.token for entry in step.logprobs] == list(step.tokens)
        for entry in step.logprobs:
            assert entry.top[0] == (entry.token, pytest.approx(entry.logprob))
            assert [logprob for _, logprob in entry.top] == sorted((logprob for _, logprob in entry.top), reverse=True)
            assert entry.logprob <= 0
            assert len(entry.top) == 3
    assert all(not step.logprobs for step in await subject.steps(sampling=GREEDY))


async def scores(subject: Subject, prompt: list[int], top: int = 2) -> list[TokenLogprob]:
    assert subject.engine.capabilities.prompt_logprobs
    parts = cast(Scorer, subject.engine).score("r", prompt, top)
    return [entry async for part in parts for entry in part]


@pytest.mark.parametrize("subject", SCORERS, indirect=True)
async def test_a_prompt_s_tokens_are_scored(subject: Subject) -> None:
    prompt = [*subject.loaded.tokenizer.encode(subject.prompt), *await subject.tokens(sampling=GREEDY)]
    found = await scores(subject, prompt)
    assert [entry.token for entry in found] == prompt[1:]
    for entry in found:
        assert entry.logprob is not None
        assert entry.rank is not None
        if entry.rank <= 2:
            assert entry.top[entry.rank - 1] == (entry.token, pytest.approx(entry.logprob))
    assert await scores(subject, prompt[:1]) == []


@pytest.mark.parametrize("subject", SCORERS, indirect=True)
async def test_scores_are_the_same_alone_and_among_others(subject: Subject) -> None:
    prompt = subject.loaded.tokenizer.encode(subject.prompt)
    alone = await scores(subject, prompt)
    among = (await asyncio.gather(scores(subject, prompt), scores(subject, prompt), subject.tokens()))[0]
    assert [entry.token for entry in among] == [entry.token for entry in alone]
    assert [entry.logprob for entry in among] == pytest.approx([entry.logprob for entry in alone], abs=1e-4)


async def test_a_grammar_is_followed_where_declared(subject: Subject) -> None:
    loaded, declared = subject.loaded, subject.engine.capabilities.grammars
    if declared == "ignored":
        assert await subject.tokens(grammar='start: "yes" | "no"') == await subject.tokens()
        return
    assert declared == "enforced"
    with pytest.raises(GrammarError, match="5"):
        loaded.compile('start: %json {"type": "integer", "minimum": 5, "maximum": 1}')
    grammar = loaded.compile('start: "yes" | "no"')
    asked: dict[str, Any] = {"seed": "2", "grammar": grammar, "end_tokens": loaded.end_tokens}
    found = await subject.steps(**asked)
    tokens = [token for step in found for token in step.tokens]
    assert (loaded.tokenizer.decode(tokens) in ("yes", "no"), found[-1].finish) == (True, "stop")
    if subject.engine.capabilities.resumes_grammars:
        rest = await subject.tokens(**asked, generated=tokens[:1])
        assert tokens[:1] + rest == tokens


@pytest.mark.parametrize("subject", [*SUBJECTS, VLLM_WITH_ADAPTERS], indirect=True)
async def test_an_adapter_s_answers_are_its_own(subject: Subject) -> None:
    if not subject.engine.capabilities.adapters:
        assert subject.loaded.adapters == frozenset()
        return
    assert subject.loaded.adapters == set(ADAPTERS)
    names = ("", *ADAPTERS)
    alone = {name: await subject.tokens(sampling=GREEDY, adapter=name) for name in names}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(names)
    # Nor does one go on with what another has computed of the same prompt, beside it or before it.
    mixed = [name for _ in range(3) for name in names]
    together = await asyncio.gather(*(subject.tokens(sampling=GREEDY, adapter=name) for name in mixed))
    assert together == [alone[name] for name in mixed]
    for name in (*reversed(names), *names):
        rest = await subject.tokens(sampling=GREEDY, adapter=name, generated=alone[name][:5], max_new_tokens=7)
        assert alone[name][:5] + rest == alone[name]


async def test_closing_a_generator_takes_its_sequence_out(subject: Subject) -> None:
    before = subject.engine.status()
    steps = subject.engine.generate(subject.request(max_new_tokens=400))
    await anext(steps)
    assert subject.engine.status().sequences == 1
    await steps.aclose()
    # Within a step, and with it goes what it had in the cache.
    await comes(lambda: subject.engine.status()._replace(steps=0) == before._replace(steps=0))


async def test_status_counts_steps(subject: Subject) -> None:
    before = subject.engine.status()
    await subject.tokens()
    after = subject.engine.status()
    assert (after.fault, after.sequences) == (None, 0)
    assert after.steps >= before.steps + 12


async def test_the_tokenizer_is_the_model_s(subject: Subject) -> None:
    tokenizer, text = subject.loaded.tokenizer, "Two words, né 🙂."
    ids = tokenizer.encode(text, special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.bytes_of, ids)) == text.encode()
    for token in tokenizer.special_tokens.values():
        assert tokenizer.decode([*ids, token]) == text
        assert tokenizer.decode([*ids, token], show=(token,)) != text
    assert all(token < tokenizer.vocabulary_size for token in await subject.tokens())
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


async def test_a_failure_is_a_fault(own: Subject) -> None:
    text = own.break_down()
    with pytest.raises(EngineFault):
        await own.tokens(text=text)
    # The simulated engine goes on; the other is beyond repair, and says so.
    if own.engine.status().fault is not None:
        with pytest.raises(EngineFault):
            await own.tokens()


async def test_close_fails_what_runs_and_what_comes(own: Subject) -> None:
    running = own.engine.generate(own.request(max_new_tokens=400))
    await anext(running)
    await own.engine.close()
    with pytest.raises(EngineFault):
        async for _ in running:
            pass
    with pytest.raises(EngineFault):
        await own.tokens()
