"""The engine that asks an inference server beside the worker, in tokens."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, cast

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import (
    EngineFault,
    EngineStatus,
    LoadedModel,
    Step,
    TokenLogprob,
    TokenRequest,
)
from forebay_inference.engine.served.dialect import AdapterDialect, Dialect, ScoringDialect, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.server import Server
from forebay_inference.engine.served.tokenizer import read_tokenizer
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.models.adapters import ensure_adapters
from forebay_inference.models.hub import files_beside_weights
from forebay_inference.models.store import ensure_gguf, ensure_model, recommended_sampling

_GREEDY: Final = Sampling(temperature=0)


class ServedEngine:
    """Asks one server, which it starts itself unless ENGINE_URL names one. Construct, `start`, `generate`, `close`."""

    def __init__(self, settings: InferenceSettings, dialect: Dialect) -> None:
        self.capabilities = dialect.capabilities
        self._settings = settings
        self._dialect = dialect
        self._server = Server(settings, dialect)
        self._served: Served | None = None

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Read the tokenizer, start or find the server, and wait until it serves; see `Engine.start`.

        Raises:
            ConfigurationError: the server ended, took longer than ENGINE_START_TIMEOUT, or serves something else.
        """
        settings, server, adapting = self._settings, self._server, cast(AdapterDialect, self._dialect)
        server.require()
        model, adapters = await in_daemon_thread(lambda: self._fetch(progress))
        progress("reading the tokenizer")
        read = await in_daemon_thread(lambda: read_tokenizer(model))

        def arguments() -> Sequence[str]:
            return adapting.adapter_arguments(settings, adapters) if adapters else ()

        async with server.starting(model, arguments, progress) as http:
            served = await server.identified(http, read.tokenizer, progress)
            self.capabilities = served.capabilities or self.capabilities
            if adapters:
                fields = await adapting.adapters(http, adapters, started=server.process is not None)
                served = replace(served, adapters=fields)
            self._served = served
            progress("warming up")
            async for _ in self.generate(TokenRequest("warm-up", read.tokenizer.encode("The"), 2, _GREEDY)):
                pass
        return LoadedModel(
            read.tokenizer,
            served.context_length,
            served.quantization,
            self._dialect.name,
            read.end_tokens | served.end_tokens,
            recommended_sampling(settings.default_model, model),
            read.compile,
            adapters=frozenset(adapters),
        )

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

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`."""
        server, (http, served) = self._server, self._asked()
        ends, left = request.end_tokens, request.max_new_tokens
        last: Step | None = None
        server.sequences += 1
        try:
            async with aclosing(self._dialect.generate(http, request, served)) as steps:
                async for step in steps:
                    if not server.asks(http):
                        # What has come already may be read although the connection is closed.
                        raise EngineFault("the engine was closed")
                    if not all(isinstance(one, int) and 0 <= one < served.vocabulary_size for one in step.tokens):
                        raise EngineFault(f"{self._dialect.name} answered with a token that its model does not have")
                    if last is not None:
                        yield last._replace(cached_tokens=step.cached_tokens)
                        return
                    server.steps += len(step.tokens)
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
            raise await server.failed(exc) from exc
        finally:
            server.sequences -= 1

    async def score(
        self, id: str, prompt: Sequence[int], top: int, adapter: str = ""
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `Scorer.score`."""
        server, (http, served) = self._server, self._asked()
        dialect = cast(ScoringDialect, self._dialect)
        server.sequences += 1
        try:
            async with aclosing(dialect.score(http, id, prompt, top, adapter, served)) as parts:
                async for part in parts:
                    server.steps += 1
                    yield part
        except ServerFailed as exc:
            raise await server.failed(exc) from exc
        finally:
            server.sequences -= 1

    def _asked(self) -> tuple[Http, Served]:
        http = self._server.serving()
        if self._served is None:
            raise EngineFault("the engine is not started, or closed")
        return http, self._served

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return self._server.status()

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._server.close()


def _cut(step: Step, ends: frozenset[int]) -> Step:
    """`step` up to its first end token."""
    count = next(place for place, token in enumerate(step.tokens, 1) if token in ends)
    return Step(step.tokens[:count], step.logprobs[:count], "stop", step.cached_tokens)
