"""How the kinds of servers are started and identified for a model that makes vectors.

vLLM's pooling runner as of 0.32, llama.cpp's `--embedding`, SGLang's `--is-embedding`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.served import llama_common, sglang, vllm_common
from forebay_inference.engine.served.dialect import Load, Served, ServerDialect
from forebay_inference.engine.served.http import Http
from forebay_inference.engine.served.metrics import samples

_DTYPE: Final = ("--dtype", "{dtype}")
"""Without it, both servers compute the float32 weights of an embedding model in 16 bits."""


class LlamaCppPooling:
    """See `ServerDialect`. It pools as the GGUF file says, and normalizes each vector."""

    name = "llama.cpp"
    package = "xllamacpp"
    weights: Literal["gguf", "checkpoint"] = "gguf"

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return llama_common.command(settings, "--embedding")

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

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return [*vllm_common.command(settings), "--runner", "pooling", *_DTYPE]

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

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """See `ServerDialect.command`."""
        return [*sglang.command(settings), "--is-embedding", *_DTYPE]

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        served, _ = await sglang.identified(http, tokenizer, special_tokens=True)
        return served

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return Load(int(sum(samples(await http.get("/metrics"), (_PROMPTS,))[_PROMPTS])))


_PROMPTS: Final = "sglang:prompt_tokens_total"

POOLING: Final[Mapping[str, Callable[[], ServerDialect]]] = {
    "llamacpp": LlamaCppPooling,
    "sglang": SGLangPooling,
    "vllm": VLLMPooling,
}
"""By the names of INFERENCE_ENGINE."""
