"""The engine that asks an inference server beside the worker, in tokens."""

import asyncio
import logging
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
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
from forebay_inference.engine.served.dialect import AdapterDialect, Dialect, Load, NotReady, ScoringDialect, Served
from forebay_inference.engine.served.http import Http, ServerFailed, ServerGone
from forebay_inference.engine.served.process import ServerProcess, filled, free_port, require
from forebay_inference.engine.served.tokenizer import read_tokenizer
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.models.adapters import ensure_adapters
from forebay_inference.models.hub import files_beside_weights
from forebay_inference.models.store import ensure_gguf, ensure_model, recommended_sampling

log = logging.getLogger(__name__)

_KEY_VARIABLES: Final = ("LLAMA_API_KEY", "VLLM_API_KEY")
"""From which servers take the key that their clients must send."""
_GREEDY: Final = Sampling(temperature=0)
_POLL_S: Final = 0.2
_PROGRESS_S: Final = 5.0
_DEATH_S: Final = 1.0
"""Time in which a server that broke off its answers is found dead."""
_GONE_S: Final = 5.0
"""Time after which nobody waits any more for a server that is gone."""
_LOOK_S: Final = 1.0
"""Pause between two questions for the server's load."""
_ANSWER_S: Final = 10.0
"""Time for an answer to one."""


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
        self._told = ""

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Read the tokenizer, start or find the server, and wait until it serves; see `Engine.start`.

        Raises:
            ConfigurationError: the server ended, took longer than ENGINE_START_TIMEOUT, or serves something else.
        """
        settings, name = self._settings, self._dialect.name
        require(self._dialect.package, settings)
        model, adapters = await in_daemon_thread(lambda: self._fetch(progress))
        progress("reading the tokenizer")
        read = await in_daemon_thread(lambda: read_tokenizer(model))
        self._http = http = await self._server(model, adapters, progress)
        try:
            async with asyncio.timeout(settings.engine_start_timeout):
                served = await self._until_served(http, read.tokenizer, progress)
                self._check(served, read.vocabulary_size)
                if adapters:
                    adapting = cast(AdapterDialect, self._dialect)
                    fields = await adapting.adapters(http, adapters, started=self._process is not None)
                    served = replace(served, adapters=fields)
                self._served = served
                progress("warming up")
                async for _ in self.generate(TokenRequest("warm-up", read.tokenizer.encode("The"), 2, _GREEDY)):
                    pass
        except TimeoutError as exc:
            raise ConfigurationError(
                f"{name} did not serve within {settings.engine_start_timeout:g} s: {self._told}"
            ) from exc
        except (EngineFault, ServerFailed) as exc:
            raise ConfigurationError(f"{name} cannot serve {settings.default_model}: {exc}") from exc
        self._watching = asyncio.create_task(self._watch(http))
        return LoadedModel(
            read.tokenizer,
            served.context_length,
            served.quantization,
            name,
            read.end_tokens | served.end_tokens,
            recommended_sampling(settings.default_model, model),
            read.compile,
            adapters=frozenset(adapters),
        )

    async def _server(self, model: Path, adapters: Mapping[str, Path], progress: Callable[[str], None]) -> Http:
        """The server of ENGINE_URL, or one that is started now."""
        url, key = self._settings.engine_url, self._settings.engine_api_key
        if url is not None:
            return Http(url, None if key is None else key.get_secret_value())
        port = free_port()
        # Other users of this machine may reach the port.
        own_key = secrets.token_hex(16) if key is None else key.get_secret_value()
        await self._start_server(model, adapters, port, own_key, progress)
        return Http(f"http://127.0.0.1:{port}", own_key)

    def _check(self, served: Served, vocabulary_size: int) -> None:
        """Take what the server can; raise ConfigurationError if its model is another."""
        if vocabulary_size > served.vocabulary_size:
            raise ConfigurationError(
                f"{self._dialect.name} serves a model of {served.vocabulary_size} tokens, and the tokenizer of "
                f"{self._settings.default_model} has {vocabulary_size}"
            )
        self.capabilities = served.capabilities or self.capabilities
        if served.slots is not None and served.slots < (slots := self._settings.slots):
            log.warning("[%s] has %d slots, and the worker has %d", self._dialect.name, served.slots, slots)

    def _fetch(self, progress: Callable[[str], None]) -> tuple[Path, dict[str, Path]]:
        """The model, and the adapters as the server knows them."""
        settings = self._settings
        ensure = ensure_gguf if self._dialect.weights == "gguf" else ensure_model
        if ensure is ensure_model and settings.engine_url is not None:
            ensure = partial(ensure_model, choose=files_beside_weights)
        model = ensure(settings.default_model, settings.data_dir, progress, settings.hf_token)
        if settings.engine_url is not None:
            return model, {name: Path(place) for name, place in settings.model_adapters.items()}
        return model, ensure_adapters(settings, self._dialect.weights, progress)

    async def _start_server(
        self, model: Path, adapters: Mapping[str, Path], port: int, key: str, progress: Callable[[str], None]
    ) -> None:
        settings = self._settings
        given = settings.engine_command
        command = self._dialect.command(settings) if given is None else shlex.split(given)
        values = {
            "python": settings.engine_python or sys.executable,
            "model": model,
            "name": settings.served_model,
            "port": port,
            "slots": settings.slots,
        }
        command = filled(command, values)
        if adapters:
            command += cast(AdapterDialect, self._dialect).adapter_arguments(settings, adapters)
        if shutil.which(command[0]) is None:
            raise ConfigurationError(f"{settings.inference_engine}: there is no program {command[0]}")
        self._process = ServerProcess(self._dialect.name, key)
        progress(f"starting {self._dialect.name}")
        await self._process.start(command, dict.fromkeys(_KEY_VARIABLES, key))

    async def _until_served(self, http: Http, tokenizer: Tokenizer, progress: Callable[[str], None]) -> Served:
        started = told = time.monotonic()
        while True:
            self._refuse_dead()
            try:
                return await self._dialect.identify(http, tokenizer)
            except (NotReady, ServerFailed) as exc:
                self._told = str(exc)
                if (now := time.monotonic()) - told >= _PROGRESS_S:
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
        last: Step | None = None
        self._sequences += 1
        try:
            async with aclosing(self._dialect.generate(http, request, served)) as steps:
                async for step in steps:
                    if self._http is not http:
                        # What has come already may be read although the connection is closed.
                        raise EngineFault("the engine was closed")
                    if not all(isinstance(one, int) and 0 <= one < served.vocabulary_size for one in step.tokens):
                        raise EngineFault(f"{self._dialect.name} answered with a token that its model does not have")
                    if last is not None:
                        yield last._replace(cached_tokens=step.cached_tokens)
                        return
                    self._steps += len(step.tokens)
                    left -= len(step.tokens)
                    if step.finish is None and not ends.isdisjoint(step.tokens):
                        step = _cut(step, ends)
                        # The server ends it too. Waiting for that keeps the connection, and tells what was cached.
                        last = step if step.tokens[-1] in served.end_tokens or left <= 0 else None
                    elif step.finish is None and left <= 0:
                        last = step._replace(finish="length")
                    if last is None:
                        yield step
                        if step.finish is not None:
                            return
            raise EngineFault(f"{self._dialect.name} ended an answer without saying why")
        except ServerFailed as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sequences -= 1

    async def score(
        self, id: str, prompt: Sequence[int], top: int, adapter: str = ""
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `Scorer.score`."""
        http, served = self._serving()
        dialect = cast(ScoringDialect, self._dialect)
        self._sequences += 1
        try:
            async with aclosing(dialect.score(http, id, prompt, top, adapter, served)) as parts:
                async for part in parts:
                    self._steps += 1
                    yield part
        except ServerFailed as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sequences -= 1

    async def _failed(self, error: ServerFailed) -> EngineFault:
        """The fault of a request whose server failed.

        A server that is gone fails this engine at once: further requests would spend their attempts on it.
        """
        if error.status is None and self._process is not None:
            await self._process.ended(_DEATH_S)
        elif error.status is None and self._http is not None:
            try:
                await self._dialect.load(self._http)
            except ServerGone as gone:
                self._fault = f"{self._dialect.name}: {gone}"
            except ServerFailed:
                pass
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
        loop, patience_s = asyncio.get_running_loop(), self._settings.engine_stall_timeout
        answer_s, silent_s = min(_ANSWER_S, patience_s), 0.0
        while self._dead() is None:
            asked = loop.time()
            try:
                async with asyncio.timeout(answer_s):
                    load = await self._dialect.load(http)
                if load.steps < self._load.steps and self._process is None:
                    # It may serve another model now, or its adapters under other numbers.
                    self._fault = f"{self._dialect.name} was started anew"
                self._load, silent_s = load, 0.0
            except Exception as exc:  # an answer may be wrong in any way
                # While this process is stopped, the server cannot answer it.
                silent_s += min(loop.time() - asked, answer_s) + _LOOK_S
                if silent_s >= (min(_GONE_S, patience_s) if isinstance(exc, ServerGone) else patience_s):
                    self._fault = f"{self._dialect.name} has not answered for {silent_s:.0f} s"
            await asyncio.sleep(_LOOK_S)

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
