"""How servers are started and asked for vectors and scores.

vLLM's pooling runner as of 0.32, llama.cpp's `--embedding` and `--reranking`, SGLang's `--is-embedding`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.served import llama_common, sglang, vllm_common
from forebay_inference.engine.served.dialect import MESSAGE_LENGTH, Load, Served, ServerDialect
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.metrics import samples

Task = Literal["embed", "rerank"]

_PART_INPUTS: Final = 64
_TOO_LONG: Final = re.compile(r"too large to process|context (size|length)|maximum model length")
_DTYPE: Final = ("--dtype", "{dtype}")
"""Without it, both servers compute the float32 weights of an embedding model in 16 bits."""


class LlamaCppPooling:
    """See `ServerDialect`. It pools as the GGUF file says, and normalizes each vector."""

    name = "llama.cpp"
    package = "xllamacpp"
    weights: Literal["gguf", "checkpoint"] = "gguf"

    def __init__(self, task: Task) -> None:
        self._option = {"embed": "--embedding", "rerank": "--reranking"}[task]

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return llama_common.command(settings, self._option)

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        async with llama_common.explained(http):
            return await llama_common.facts(http, tokenizer, special_tokens=True)

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return await llama_common.load(http)


class VLLMPooling:
    """See `ServerDialect`."""

    name = "vLLM"
    package = "vllm"
    weights: Literal["gguf", "checkpoint"] = "checkpoint"

    def __init__(self, task: Task) -> None:
        """Both tasks are one to it: the checkpoint says what it is for."""

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return vllm_common.command(settings, "--runner", "pooling", *_DTYPE)

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        served, _ = await vllm_common.identified(http, tokenizer, special_tokens=True)
        return served

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return await vllm_common.load(http)


class SGLangPooling:
    """See `ServerDialect`. Written after its source, as `SGLang` is."""

    name = "SGLang"
    package = "sglang"
    weights: Literal["gguf", "checkpoint"] = "checkpoint"

    def __init__(self, task: Task) -> None:
        """Both tasks are one to it: the checkpoint says what it is for."""

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return sglang.command(settings, "--enable-metrics", "--is-embedding", *_DTYPE)

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        served, _ = await sglang.identified(http, tokenizer, special_tokens=True)
        return served

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return Load(int(sum(samples(await http.get("/metrics"), (_PROMPTS,))[_PROMPTS])))


_PROMPTS: Final = "sglang:prompt_tokens_total"

POOLING: Final[Mapping[str, Callable[[Task], ServerDialect]]] = {
    "llamacpp": LlamaCppPooling,
    "sglang": SGLangPooling,
    "vllm": VLLMPooling,
}
"""By the names of INFERENCE_ENGINE."""


def parts(inputs: Mapping[int, Sized], most: int) -> Iterator[list[int]]:
    """The indices of `inputs` in parts of 64 at most, and of `most` tokens or characters. A longer input is a part.

    A server gets one part of a request at once: other requests have their turn in between, and a takeover repeats no
    more than that.
    """
    part: list[int] = []
    length = 0
    for index, given in inputs.items():
        if part and (len(part) == _PART_INPUTS or length + len(given) > most):
            yield part
            part, length = [], 0
        part.append(index)
        length += len(given)
    if part:
        yield part


def refused(error: ServerFailed, param: str) -> InvalidRequest | None:
    """The request's own fault, if that is why the server failed."""
    # llama.cpp calls an input longer than its batch an error of its own.
    if error.status not in (400, 413, 422) and "too large to process" not in error.detail:
        return None
    try:
        message = json.loads(error.detail)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = str(error)
    told = str(message)[:MESSAGE_LENGTH]
    code = "context_length_exceeded" if _TOO_LONG.search(told) else None
    return InvalidRequest(f"The engine refuses the request: {told}", param=param, code=code)
