"""The engine that asks an inference server beside the worker for vectors."""

import base64
import binascii
import json
import sys
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import EngineStatus, LoadedModel
from forebay_inference.engine.served.dialect import ServerDialect
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.pooling import parts, refused
from forebay_inference.engine.served.server import Server
from forebay_inference.engine.threads import in_daemon_thread

_PATH: Final = "/v1/embeddings"
_FLOAT_BYTES: Final = 4
_PART_TOKENS: Final = 16_384


class ServedEmbedder:
    """Asks one server, which it starts itself unless ENGINE_URL names one. Construct, `start`, `embed`, `close`."""

    def __init__(self, settings: InferenceSettings, dialect: ServerDialect) -> None:
        self._dialect = dialect
        self._server = Server(settings, dialect)
        self._dimensions = 0

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Read the tokenizer, start or find the server, and wait until it serves; see `Engine.start`.

        Raises:
            ConfigurationError: the server ended, took longer than ENGINE_START_TIMEOUT, or serves something else.
        """
        server = self._server
        model, tokenizer = await server.fetched(progress)
        if self._dialect.weights == "gguf":
            await _refuse_ranker(model)
        async with server.starting(model, tuple, progress) as http:
            served = await server.identified(http, tokenizer, progress)
            progress("warming up")
            (vector,) = await _vectors(http, [tokenizer.encode("The")], None)
            if not vector:
                raise ServerFailed(f"{_PATH} was answered with an empty vector")
            self._dimensions = len(vector) // _FLOAT_BYTES
        return LoadedModel(
            tokenizer,
            served.context_length,
            served.quantization,
            self._dialect.name,
            dimensions=None if _can_be_cut(model) else self._dimensions,
            prefix=_prefix(model),
        )

    async def embed(
        self, inputs: Mapping[int, Sequence[int]], dimensions: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """See `Embedder.embed`.

        Raises:
            InvalidRequest: the server refuses an input, or the number of dimensions.
        """
        server, http = self._server, self._server.serving()
        if dimensions == self._dimensions:
            dimensions = None  # vLLM refuses any number for a checkpoint that was not made to be cut
        server.sequences += len(inputs)
        left = len(inputs)
        try:
            for part in parts(inputs, _PART_TOKENS):
                vectors = await _vectors(http, [inputs[index] for index in part], dimensions)
                if {len(vector) for vector in vectors} != {(dimensions or self._dimensions) * _FLOAT_BYTES}:
                    raise ServerFailed(f"{_PATH} was answered with vectors of other dimensions")
                server.steps += 1
                for index, values in zip(part, vectors, strict=True):
                    server.sequences -= 1
                    left -= 1
                    yield index, values
        except ServerFailed as exc:
            raise refused(exc, "input" if dimensions is None else "dimensions") or await server.failed(exc) from exc
        finally:
            server.sequences -= left

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return self._server.status()

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._server.close()


async def _refuse_ranker(file: Path) -> None:
    from forebay_inference.engine.served.gguf_head import head_of

    if (await in_daemon_thread(lambda: head_of(file))).ranks:  # llama.cpp would answer with whatever its memory holds
        raise ConfigurationError(f"{file} is a cross-encoder and computes scores: set MODEL_TASK=rerank")


async def _vectors(http: Http, inputs: Sequence[Sequence[int]], dimensions: int | None) -> list[bytes]:
    """The vector of each of `inputs`, as float32, little-endian; raises ServerFailed."""
    body: dict[str, Any] = {"input": inputs, "encoding_format": "base64"}
    if dimensions is not None:
        body["dimensions"] = dimensions
    answer = await http.json(_PATH, body, None)
    try:
        told = {one["index"]: _vector(one["embedding"]) for one in answer["data"]}
        if len(answer["data"]) != len(inputs):
            raise ValueError
        return [told[place] for place in range(len(inputs))]
    except (LookupError, TypeError, ValueError, binascii.Error) as exc:
        raise ServerFailed(f"{_PATH} was not answered with vectors: {type(exc).__name__}") from exc


def _vector(told: str | Sequence[float]) -> bytes:
    if isinstance(told, str):
        return base64.b64decode(told, validate=True)
    values = array("f", told)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _can_be_cut(model: Path) -> bool:
    """Whether the vectors of the checkpoint are made to be cut to fewer dimensions, as vLLM and SGLang read it."""
    config = _read(model / "config.json")
    return bool(config.get("matryoshka_dimensions") or config.get("is_matryoshka"))


def _prefix(model: Path) -> str:
    """What a checkpoint of sentence-transformers puts before each text by default."""
    config = _read(model / "config_sentence_transformers.json")
    return str((config.get("prompts") or {}).get(config.get("default_prompt_name") or "", ""))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, as beside a GGUF file."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
