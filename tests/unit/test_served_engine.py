"""An inference server that is slow, wrong, broken or gone. It is a fake one, which speaks llama.cpp's dialect."""

import asyncio
import contextlib
import errno
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.wire.errors import ApiError, ConfigurationError, InvalidRequest
from forebay_contracts.wire.request import InferenceRequest, Sampling
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.engine.protocol import EngineFault, LoadedModel, Step, TokenRequest
from forebay_inference.engine.served import server as served_server
from forebay_inference.engine.served.engine import ServedEngine
from forebay_inference.engine.served.llamacpp import LlamaCpp
from forebay_inference.engine.served.process import filled
from forebay_inference.engine.served.tokenizer import read_tokenizer
from forebay_inference.engine.text.model import TextModel
from forebay_inference.health import EngineWatch
from support.engine import chat
from support.fake_llama import FakeLlama, send
from support.gguf import write_tiny_gguf
from support.twins import Twins, twins
from support.twins import request as request_of_twins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest_asyncio.fixture
async def server(model: Path) -> AsyncIterator[FakeLlama]:
    async with FakeLlama(read_tokenizer(model).tokenizer).running() as fake:
        yield fake


def engine_at(url: str, model: Path, **settings: Any) -> ServedEngine:
    given = {"default_model": str(model), "engine_url": url, "max_concurrent_requests": 4, **settings}
    return ServedEngine(InferenceSettings(_env_file=None, **given), LlamaCpp())


SOON_STUCK = pytest.mark.parametrize("engine", [1], indirect=True)
"""The engine waits 1 s for its server. The others wait longer than a busy machine stands still."""


@pytest_asyncio.fixture
async def engine(
    request: pytest.FixtureRequest, server: FakeLlama, model: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ServedEngine]:
    """An engine that has started, and looks at its server often."""
    monkeypatch.setattr(served_server, "_LOOK_S", 0.02)
    started = engine_at(server.url, model, engine_stall_timeout=getattr(request, "param", 30))
    await started.start(lambda line: None)
    server.requests.clear()
    yield started
    await started.close()


def request(**fields: Any) -> TokenRequest:
    given = {"max_new_tokens": 4, "sampling": Sampling(temperature=0), "seed": "1", **fields}
    return TokenRequest("r", [1, 2, 3], **given)


async def steps(engine: ServedEngine, **fields: Any) -> list[Step]:
    return [step async for step in engine.generate(request(**fields))]


async def comes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_an_answer_has_its_tokens_its_end_and_what_was_cached(server: FakeLlama, engine: ServedEngine) -> None:
    found = await steps(engine)
    assert [len(step.tokens) for step in found] == [1, 1, 1, 1]
    assert (found[-1].finish, found[-1].cached_tokens) == ("length", 3)
    connections = len(server.connections)
    end = frozenset({found[1].tokens[0]})
    assert [len(step.tokens) for step in await steps(engine, end_tokens=end)] == [1, 1]
    await steps(engine)
    # The second one was cut off, so its connection is no more; the others were kept.
    assert len(server.connections) <= connections + 2


async def test_a_greedy_answer_takes_no_sampler_over_the_whole_vocabulary(
    server: FakeLlama, engine: ServedEngine
) -> None:
    for temperature in (0, 0.5):
        await steps(engine, sampling=Sampling(temperature=temperature))
    greedy, sampled = server.requests[-2:]
    assert (greedy["samplers"], greedy["top_k"]) == (["penalties", "top_k"], 1)
    assert (sampled["samplers"][1:], sampled["top_k"]) == (["temperature", "top_k", "top_p", "min_p"], 0)


async def test_the_server_loads_meanwhile(server: FakeLlama, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_server, "_PROGRESS_S", 0)
    monkeypatch.setattr(served_server, "_POLL_S", 0.01)
    server.statuses["/health"] = 503
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if "it loads the model" in line:
            server.statuses.clear()

    engine = engine_at(server.url, model)
    loaded = await engine.start(progress)
    assert any(line.startswith("waiting for llama.cpp") for line in lines)
    assert (loaded.context_length, loaded.quantization, loaded.device) == (512, "F32", "llama.cpp")
    assert loaded.end_tokens == {257}
    await engine.close()


async def fails_to_start(server: FakeLlama, model: Path, **settings: Any) -> str:
    engine = engine_at(server.url, model, engine_start_timeout=1, **settings)
    try:
        with pytest.raises(ConfigurationError) as found:
            await engine.start(lambda line: None)
    finally:
        await engine.close()
    return str(found.value)


async def test_a_server_that_never_loads_ends_the_start(server: FakeLlama, model: Path) -> None:
    server.statuses["/health"] = 503
    assert await fails_to_start(server, model) == "llama.cpp did not serve within 1 s: it loads the model"


async def test_a_server_that_hangs_ends_the_start(server: FakeLlama, model: Path) -> None:
    server.steps = None
    assert "did not serve within 1 s" in await fails_to_start(server, model)


async def test_no_server_ends_the_start(model: Path) -> None:
    assert "nothing answers at" in await fails_to_start(FakeLlamaAway(), model)


class FakeLlamaAway(FakeLlama):
    def __init__(self) -> None:
        self.url = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/props", "/props was answered with status 404"),
        ("/metrics", "start it with --metrics"),
        ("/health", "status 404"),
    ],
)
async def test_another_server_is_refused(server: FakeLlama, model: Path, path: str, said: str) -> None:
    server.statuses[path] = 404
    assert said in await fails_to_start(server, model)


async def test_another_model_is_refused(server: FakeLlama, model: Path) -> None:
    server.vocabulary_size = 300
    tokenizer = server.tokenizer

    class Other:
        vocabulary_size = 300

        def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
            return tokenizer.encode(text)[1:]

    server.tokenizer = Other()  # type: ignore[assignment]
    assert "another tokenizer" in await fails_to_start(server, model)


async def test_a_smaller_vocabulary_is_refused(model: Path) -> None:
    async with FakeLlama(read_tokenizer(model).tokenizer, vocabulary_size=200).running() as server:
        assert "serves a model of 200 tokens" in await fails_to_start(server, model)


async def test_fewer_slots_than_the_worker_s_are_told(
    server: FakeLlama, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(server.url, model, max_concurrent_requests=9)
    await engine.start(lambda line: None)
    assert "has 8 slots, and the worker has 9" in caplog.text
    await engine.close()


async def garbage(response: web.StreamResponse) -> None:
    await response.write(b"data: {nonsense\n\n")


async def breaks_off(response: web.StreamResponse) -> None:
    await send(response, [1], 1)
    assert response._req is not None
    assert response._req.transport is not None
    response._req.transport.abort()


async def ends_early(response: web.StreamResponse) -> None:
    await send(response, [1], 1)


async def fails_inside(response: web.StreamResponse) -> None:
    await response.write(b'data: {"error": {"code": 500, "message": "secret"}}\n\n')


async def no_token(response: web.StreamResponse) -> None:
    await send(response, [1_000_000], 1)


async def no_number(response: web.StreamResponse) -> None:
    await send(response, ["1"], 1)  # type: ignore[list-item]


@pytest.mark.parametrize("behaviour", [garbage, breaks_off, ends_early, fails_inside, no_token, no_number])
async def test_a_broken_answer_is_a_fault_of_its_request_alone(
    server: FakeLlama, engine: ServedEngine, behaviour: Any
) -> None:
    server.behaviours.append(behaviour)
    with pytest.raises(EngineFault) as found:
        await steps(engine)
    assert "secret" not in str(found.value)
    assert engine.status()[:2] == (None, 0)
    assert (await steps(engine))[-1].finish == "length"


async def test_an_error_is_a_fault_that_quotes_nothing(server: FakeLlama, engine: ServedEngine) -> None:
    server.statuses["/completion"] = 500
    with pytest.raises(EngineFault, match="/completion was answered with status 500"):
        await steps(engine)
    assert engine.status().fault is None


async def test_a_kept_connection_that_the_server_has_closed_is_no_failure(
    server: FakeLlama, engine: ServedEngine
) -> None:
    await steps(engine)
    for transport in server.connections:
        if transport is not None:
            # The server's end is shut before the client's event loop may hear of it.
            transport.abort()
    assert (await steps(engine))[-1].finish == "length"


async def test_closing_the_generator_closes_the_connection(server: FakeLlama, engine: ServedEngine) -> None:
    server.delay_s = 0.01
    running = engine.generate(request(max_new_tokens=400))
    await anext(running)
    assert engine.status().sequences == 1
    await running.aclose()
    assert engine.status().sequences == 0
    await comes(lambda: server.closed == 1)


async def test_a_long_prompt_makes_steps_by_the_server_s_metrics_alone(server: FakeLlama, engine: ServedEngine) -> None:
    server.behaviours.append(lambda response: asyncio.Event().wait())  # type: ignore[arg-type,return-value]
    running = asyncio.ensure_future(anext(engine.generate(request())))
    await comes(lambda: engine.status().sequences == 1)
    seen = engine.status().steps
    server.steps = 5
    await comes(lambda: engine.status().steps == seen + 5)
    # Metrics that stand still are a hang.
    watch = EngineWatch(TextModel(engine), stall_timeout_s=2)
    for _ in range(3):
        assert watch.fault() is None
        watch.look()
    assert "no step in 2 s" in str(watch.fault())
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


@SOON_STUCK
async def test_a_server_that_answers_nothing_any_more_is_a_fault(server: FakeLlama, engine: ServedEngine) -> None:
    server.steps = None
    await comes(lambda: "llama.cpp has not answered for 1 s" in str(engine.status().fault))
    with pytest.raises(EngineFault, match="has not answered"):
        await steps(engine)


async def test_a_server_that_was_started_anew_is_another_one(server: FakeLlama, engine: ServedEngine) -> None:
    server.steps = 10
    await comes(lambda: engine.status().steps >= 10)
    server.steps = 0
    await comes(lambda: engine.status().fault == "llama.cpp was started anew")


@SOON_STUCK
async def test_metrics_that_make_no_sense_are_no_answer(server: FakeLlama, engine: ServedEngine) -> None:
    server.steps = "many"
    await comes(lambda: "llama.cpp has not answered for 1 s" in str(engine.status().fault))


async def test_a_process_without_files_left_does_not_take_its_server_for_gone(
    engine: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = engine._server._http
    assert http is not None

    async def refuse(*_: Any, **__: Any) -> None:
        key: Any = SimpleNamespace(host="h", port=1, ssl=True)
        raise aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "too many open files"))

    monkeypatch.setattr(http._kept, "request", refuse)
    with pytest.raises(EngineFault, match="too many connections"):
        await steps(engine)
    assert engine.status().fault is None


async def test_a_server_that_is_gone_is_a_fault_at_once(model: Path) -> None:
    async with FakeLlama(read_tokenizer(model).tokenizer).running() as server:
        engine = engine_at(server.url, model)
        await engine.start(lambda line: None)
    with pytest.raises(EngineFault):
        await steps(engine)
    assert "nothing answers at" in str(engine.status().fault)
    await engine.close()


async def test_a_server_without_llguidance_takes_no_grammar(
    server: FakeLlama, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCpp, "_guides", lambda self, http: asyncio.sleep(0, result=False))
    engine = engine_at(server.url, model)
    assert engine.capabilities.grammars == "enforced"
    loaded: LoadedModel = await engine.start(lambda line: None)
    assert engine.capabilities.grammars == "no"
    assert loaded.compile('start: "a"').lark
    await engine.close()


@contextlib.asynccontextmanager
async def two_workers(model: Path, system: Twins) -> AsyncIterator[list[FakeLlama]]:
    """Two workers, each with a server of its own, which answers slowly."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for name in ("w1", "w2"):
            fake = await stack.enter_async_context(FakeLlama(read_tokenizer(model).tokenizer).running())
            text = TextModel(engine_at(fake.url, model))
            await text.start(lambda line: None)
            stack.push_async_callback(text.close)
            fake.requests.clear()
            fake.delay_s = 0.01
            system.worker(name, slots=1, engine=text)
            servers.append(fake)
        yield servers


async def test_a_killed_server_s_answer_is_taken_over(model: Path) -> None:
    async with twins() as system, two_workers(model, system) as servers:
        wanted, other = system_request(max_tokens=30), system_request(max_tokens=30)
        undisturbed = await system.text(other)
        before = [len(fake.requests) for fake in servers]
        async with system.dispatcher.submit(wanted) as answer:
            await answer.started()
            text = "".join(delta.text for delta in await anext(answer.deltas()))
            (first,) = [fake for fake, count in zip(servers, before, strict=True) if len(fake.requests) > count]
            await first.kill()
            text += "".join([delta.text async for some in answer.deltas() for delta in some])
        assert text == undisturbed
        assert (await system.state(wanted.id)).attempt == 2


async def test_an_answer_that_cannot_be_resumed_ends_with_one_error_that_says_so(model: Path) -> None:
    async with twins() as system, two_workers(model, system) as servers:
        wanted = system_request(max_tokens=30, response_format={"type": "regex", "regex": r"[^ ]{30}"})
        async with system.dispatcher.submit(wanted) as answer:
            await answer.started()
            await anext(answer.deltas())
            (first,) = [fake for fake in servers if fake.requests]
            await first.kill()
            with pytest.raises(ApiError, match="cannot go on with the part of the answer that was sent"):
                [delta async for delta in answer.deltas()]
        await system.reaches(wanted.id, RequestStatus.FAILED)
        assert sum(len(fake.requests) for fake in servers) == 1


def system_request(**fields: Any) -> InferenceRequest:
    sampling = Sampling(temperature=0, max_tokens=fields.pop("max_tokens"))
    return request_of_twins(sampling=sampling, messages=({"role": "user", "content": "hi"},), **fields)


async def test_what_llama_cpp_does_otherwise_is_refused_by_name(model: Path, server: FakeLlama) -> None:
    text = TextModel(engine_at(server.url, model))
    await text.start(lambda line: None)
    for name, value in {"presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 3}.items():
        with pytest.raises(InvalidRequest, match=f"does not support {name}"):
            await anext(text.generate(chat(**{name: value}), {}))
    await text.close()


async def test_an_answer_that_leaves_its_grammar_is_a_fault(model: Path, server: FakeLlama) -> None:
    engine = engine_at(server.url, model)
    loaded = await engine.start(lambda line: None)
    with pytest.raises(EngineFault, match="leaves its grammar"):
        await steps(engine, grammar=loaded.compile('start: "no"'), end_tokens=loaded.end_tokens)
    await engine.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"max_concurrent_requests": 257, "max_queue_size": 300, "llm_batch_size": 512},
            "at most 256 requests at once",
        ),
        ({"model_quantization": "nf4"}, "MODEL_QUANTIZATION=nf4: a GGUF file has its own"),
    ],
)
def test_settings_that_llama_cpp_cannot_have_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        LlamaCpp().command(InferenceSettings(_env_file=None, **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine_command": "x", "engine_url": "http://h"}, "give one of them"),
        ({"engine_command": "x 'y"}, "ENGINE_COMMAND cannot be split into words: No closing quotation"),
        ({"engine_command": " "}, "ENGINE_COMMAND has no words"),
        ({"engine_url": "http://me:secret@h"}, "takes no user or password"),
    ],
)
def test_a_command_or_an_address_that_cannot_be_used_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as found:
        load(InferenceSettings, **settings)
    assert "secret" not in str(found.value)


async def test_the_key_of_a_server_is_in_no_line(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    given = {"engine_command": "sh -c 'echo $LLAMA_API_KEY k3y; exit 1' --api-key k3y", "engine_api_key": "k3y"}
    engine = ServedEngine(InferenceSettings(_env_file=None, default_model=str(model), **given), LlamaCpp())
    with pytest.raises(ConfigurationError) as found:
        await engine.start(lambda line: None)
    await engine.close()
    assert "*** ***" in str(found.value)
    assert "--api-key ***" in caplog.text
    assert "k3y" not in caplog.text + str(found.value)


async def test_a_command_that_is_missing_or_ends_is_told_with_its_last_lines(model: Path) -> None:
    for command, said in [
        ("no-such-server --port {port}", "there is no program no-such-server"),
        (
            "sh -c 'echo first; echo no model at {model} >&2; exit 3'",
            f"exit code 3; its last lines: first | no model at {model}",
        ),
    ]:
        engine = ServedEngine(
            InferenceSettings(_env_file=None, default_model=str(model), engine_command=command), LlamaCpp()
        )
        with pytest.raises(ConfigurationError) as found:
            await engine.start(lambda line: None)
        assert said in str(found.value)
        await engine.close()


def test_a_command_is_filled_in_once() -> None:
    values = {"model": "/a b/{port}", "port": 80}
    assert filled(["run", "{model}", "--x={port}", "{other}"], values) == ["run", "/a b/{port}", "--x=80", "{other}"]


async def test_a_missing_package_is_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaCpp, "package", "no_such_package")
    engine = ServedEngine(InferenceSettings(_env_file=None, inference_engine="llamacpp"), LlamaCpp())
    with pytest.raises(ConfigurationError, match="llamacpp needs the package no_such_package"):
        await engine.start(pytest.fail)


def test_no_torch_is_needed(model: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "import forebay_inference.__main__, forebay_inference.engine.served.dialects\n"
        "from forebay_inference.engine.served.tokenizer import read_tokenizer\n"
        f"assert read_tokenizer(Path({str(model)!r})).tokenizer.encode('ab')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
