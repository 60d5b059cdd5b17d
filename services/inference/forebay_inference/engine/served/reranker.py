"""The engine that asks an inference server beside the worker how relevant documents are."""

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import EngineStatus, LoadedModel
from forebay_inference.engine.served.dialect import ServerDialect
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.pooling import parts, refused
from forebay_inference.engine.served.server import Server
from forebay_inference.engine.threads import in_daemon_thread

_PATH: Final = "/v1/rerank"
_PART_CHARACTERS: Final = 65_536
_TELL_PROBABILITIES: Final = "qwen3"
"""Of models of this architecture, llama.cpp tells a score from 0 to 1. Of others it is the logit."""


class ServedReranker:
    """Asks one server, which it starts itself unless ENGINE_URL names one. Construct, `start`, `rerank`, `close`."""

    def __init__(self, settings: InferenceSettings, dialect: ServerDialect) -> None:
        self._dialect = dialect
        self._server = Server(settings, dialect)
        self._relevance: Callable[[float], float] = float

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Read the tokenizer, start or find the server, and wait until it serves; see `Engine.start`.

        Raises:
            ConfigurationError: the server ended, took longer than ENGINE_START_TIMEOUT, or serves something else.
        """
        server = self._server
        model, tokenizer = await server.fetched(progress)
        if self._dialect.weights == "gguf":
            await self._read(model)
        async with server.starting(model, tuple, progress) as http:
            served = await server.identified(http, tokenizer, progress)
            progress("warming up")
            await _scores(http, "The", ["The"])
        return LoadedModel(tokenizer, served.context_length, served.quantization, self._dialect.name)

    async def _read(self, file: Path) -> None:
        """Find out what the scores of llama.cpp will be; raises ConfigurationError where they would mean nothing."""
        from forebay_inference.engine.served.gguf_head import head_of

        head = await in_daemon_thread(lambda: head_of(file))
        if not head.classifies:
            raise ConfigurationError(f"{file} is no cross-encoder: the file has no classifier")
        if not head.architecture.startswith(_TELL_PROBABILITIES):
            self._relevance = _sigmoid

    async def rerank(
        self, query: str, documents: Mapping[int, str]
    ) -> AsyncGenerator[tuple[Mapping[int, float], int], None]:
        """See `Reranker.rerank`."""
        server, http = self._server, self._server.serving()
        server.sequences += len(documents)
        left = len(documents)
        try:
            for part in parts(documents, _PART_CHARACTERS):
                scores, tokens = await _scores(http, query, [documents[index] for index in part])
                server.steps += 1
                server.sequences -= len(part)
                left -= len(part)
                yield dict(zip(part, map(self._relevance, scores), strict=True)), tokens
        except ServerFailed as exc:
            raise refused(exc, "documents") or await server.failed(exc) from exc
        finally:
            server.sequences -= left

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return self._server.status()

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._server.close()


async def _scores(http: Http, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
    """The server's score of each of `documents`, and the tokens that all took; raises ServerFailed."""
    answer = await http.json(_PATH, {"query": query, "documents": documents, "top_n": len(documents)}, None)
    try:
        # SGLang tells a bare list, and no usage.
        results = answer if isinstance(answer, list) else answer["results"]
        usage = {} if isinstance(answer, list) else answer["usage"]
        told = {one["index"]: float(one["relevance_score" if "relevance_score" in one else "score"]) for one in results}
        if len(results) != len(documents):
            raise ValueError
        scores = [told[place] for place in range(len(documents))]
        tokens = int(usage.get("total_tokens") or 0)
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ServerFailed(f"{_PATH} was not answered with scores: {type(exc).__name__}") from exc
    return scores, tokens


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
