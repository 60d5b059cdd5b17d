"""The engine that asks an inference server beside the worker, in tokens."""

import asyncio
import logging
import shlex
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final, cast

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import (
    EngineFault,
    EngineStatus,
    LoadedModel,
    Step,
    Tokenizer,
    TokenLogprob,
    TokenRequest,
)
from forebay_inference.engine.served.dialect import Dialect, Load, NotReady, ScoringDialect, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.process import ServerProcess, filled
from forebay_inference.engine.served.tokenizer import read_tokenizer
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.models.store import ensure_gguf, ensure_model, recommended_sampling

log = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_PROGRESS_S: Final = 5.0
_DEATH_S: Final = 1.0
"""Time in which a server that broke off its answers is found dead."""
_LOOK_S: Final = 1.0
"""Interval of the questions for the server's load."""


class ServedEngine:
    """Asks one server, which it starts itself unless ENGINE_URL names one. Construct, `start`, `generate`, `close`."""

    def __init__(self, settings: InferenceSettings, dialect: Dialect) -> None:
        self.capabilities = dialect.capabilities
        self._settings = settings
        self._dialect = dialect
        self._http: Http | None = None
        self._process: ServerProcess | None = None
        self._served: Served | None = None
        self._watching: asyncio.Task[None] | None = None
        self._sequences = 0
        self._steps = 0
        self._load = Load(0)
        self._fault: str | None = None

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Read the tokenizer, start or find the server, and wait until it serves; see `Engine.start`.

        Raises:
            ConfigurationError: the server ended, took longer than ENGINE_START_TIMEOUT, or serves something else.
        """
        settings, dialect = self._settings, self._dialect
        model = await in_daemon_thread(lambda: self._fetch(progress))
        progress("reading the tokenizer")
        read = await in_daemon_thread(lambda: read_tokenizer(model))
        url = settings.engine_url
        if url is None:
            port = _free_port()
            url = f"http://127.0.0.1:{port}"
            await self._start_server(model, port, progress)
        key = settings.engine_api_key
        self._http = Http(url, None if key is None else key.get_secret_value())
        self._served = served = await self._until_served(self._http, read.tokenizer, progress)
        if read.vocabulary_size > served.vocabulary_size:
            raise ConfigurationError(
                f"{dialect.name} serves a model of {served.vocabulary_size} tokens, and the tokenizer of "
                f"{settings.default_model} has {read.vocabulary_size}"
            )
        self.capabilities = served.capabilities or self.capabilities
        if served.slots is not None and served.slots < settings.slots:
            log.warning("[%s] has %d slots, and the worker has %d", dialect.name, served.slots, settings.slots)
        progress("warming up")
        warm_up = TokenRequest("warm-up", read.tokenizer.encode("The"), 2, Sampling(temperature=0))
        try:
            async for _ in self.generate(warm_up):
                pass
        except EngineFault as exc:
            raise ConfigurationError(f"{dialect.name} cannot serve {settings.default_model}: {exc}") from exc
        self._watching = asyncio.create_task(self._watch(self._http))
        return LoadedModel(
            read.tokenizer,
            served.context_length,
            served.quantization,
            dialect.name,
            read.end_tokens | served.end_tokens,
            recommended_sampling(settings.default_model, model),
            read.compile,
        )

    def _fetch(self, progress: Callable[[str], None]) -> Path:
        settings = self._settings
        ensure = ensure_gguf if self._dialect.weights == "gguf" else ensure_model
        return ensure(settings.default_model, settings.data_dir, progress, settings.hf_token)

    async def _start_server(self, model: Path, port: int, progress: Callable[[str], None]) -> None:
        settings = self._settings
        given = settings.engine_command
        command = self._dialect.command(settings) if given is None else shlex.split(given)
        values = {"model": model, "name": settings.served_model, "port": port, "slots": settings.slots}
        self._process = ServerProcess(self._dialect.name)
        progress(f"starting {self._dialect.name}")
        try:
            await self._process.start(filled(command, values))
        except OSError as exc:
            raise ConfigurationError(f"{command[0]} cannot be started: {exc.strerror}") from exc

    async def _until_served(self, http: Http, tokenizer: Tokenizer, progress: Callable[[str], None]) -> Served:
        started = told = time.monotonic()
        while True:
            self._refuse_dead()
            try:
                return await self._dialect.identify(http, tokenizer)
            except (NotReady, ServerFailed) as exc:
                now = time.monotonic()
                if now - started > self._settings.engine_start_timeout:
                    raise ConfigurationError(
                        f"{self._dialect.name} did not serve within {self._settings.engine_start_timeout:g} s: {exc}"
                    ) from exc
                if now - told >= _PROGRESS_S:
                    told = now
                    progress(f"waiting for {self._dialect.name} ({now - started:.0f} s): {exc}")
            await asyncio.sleep(_POLL_S)

    def _refuse_dead(self) -> None:
        if self._process is not None and (fault := self._process.fault) is not None:
            raise ConfigurationError(fault)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`."""
        http, served = self._serving()
        ends, left = request.end_tokens, request.max_new_tokens
        self._sequences += 1
        try:
            async with aclosing(self._dialect.generate(http, request, served)) as steps:
                async for step in steps:
                    self._steps += len(step.tokens)
                    left -= len(step.tokens)
                    if step.finish is None and not ends.isdisjoint(step.tokens):
                        step = _cut(step, ends)
                    elif step.finish is None and left <= 0:
                        step = step._replace(finish="length")
                    yield step
                    if step.finish is not None:
                        return
            raise EngineFault(f"{self._dialect.name} ended an answer without saying why")
        except ServerFailed as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sequences -= 1

    async def score(self, id: str, prompt: Sequence[int], top: int) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `Scorer.score`."""
        http, served = self._serving()
        dialect = cast(ScoringDialect, self._dialect)
        self._sequences += 1
        try:
            async with aclosing(dialect.score(http, id, prompt, top, served)) as parts:
                async for part in parts:
                    self._steps += 1
                    yield part
        except ServerFailed as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sequences -= 1

    async def _failed(self, error: ServerFailed) -> EngineFault:
        """The fault of a request whose server failed. If the server has ended, that is the reason."""
        if self._process is not None and error.status is None:
            await self._process.ended(_DEATH_S)
        return EngineFault(self._dead() or f"{self._dialect.name}: {error}")

    def _serving(self) -> tuple[Http, Served]:
        if self._http is None or self._served is None:
            raise EngineFault("the engine is not started, or closed")
        if (fault := self._dead()) is not None:
            raise EngineFault(fault)
        return self._http, self._served

    def _dead(self) -> str | None:
        if self._fault is None and self._process is not None:
            self._fault = self._process.fault
        return self._fault

    def status(self) -> EngineStatus:
        """See `Engine.status`. The steps are those of the server and those that have come from it."""
        return EngineStatus(self._dead(), self._sequences, self._load.steps + self._steps, self._load.cache_usage)

    async def _watch(self, http: Http) -> None:
        """Ask for the server's load, and find out when it answers no more."""
        heard = time.monotonic()
        while self._dead() is None:
            await asyncio.sleep(_LOOK_S)
            try:
                self._load = await self._dialect.load(http)
                heard = time.monotonic()
            except ServerFailed as exc:
                silent_s = time.monotonic() - heard
                if silent_s >= self._settings.engine_stall_timeout:
                    self._fault = f"{self._dialect.name} has not answered for {silent_s:.0f} s: {exc}"

    async def close(self) -> None:
        """See `Engine.close`."""
        http, self._http = self._http, None
        if self._watching is not None:
            self._watching.cancel()
        if http is not None:
            await http.close()
        if self._process is not None:
            await self._process.close()


def _cut(step: Step, ends: frozenset[int]) -> Step:
    """`step` up to its first end token."""
    count = next(place for place, token in enumerate(step.tokens, 1) if token in ends)
    return Step(step.tokens[:count], step.logprobs[:count], "stop", step.cached_tokens)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
