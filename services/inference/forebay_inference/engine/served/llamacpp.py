"""llama.cpp's server: `llama-server`, or the same from the wheel `xllamacpp`."""

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import Capabilities, Step, Tokenizer, TokenRequest
from forebay_inference.engine.served.dialect import Load, NotReady, Served
from forebay_inference.engine.served.http import Http, ServerFailed

_PATH: Final = "/completion"
_PROBE: Final = "The quick brown fox: 3,14 né 漢字 🙂\n\n  def f(x):\n\treturn x"
"""A text that tokenizers of different models cut differently."""

# Ours in their order: temperature before the others, and no sampler that the request did not ask for.
_SAMPLERS: Final = ("penalties", "temperature", "top_k", "top_p", "min_p")
_FINAL_FIELDS: Final = ("stop", "stop_type", "tokens", "tokens_predicted", "truncated", "timings/cache_n")


class LlamaCpp:
    """See `Dialect`."""

    name = "llama.cpp"
    weights: Literal["gguf", "checkpoint"] = "gguf"
    capabilities = Capabilities(resumes="greedy", grammars="enforced", logprobs=True)

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """The server of the wheel `xllamacpp`, in a process of its own."""
        server = [sys.executable, "-m", "forebay_inference.engine.served.llama_server"]
        return [*server, "{model}", "{port}", "{slots}", str(settings.llm_batch_size)]

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `Dialect.identify`."""
        try:
            await http.get("/health")
            props = await http.json("/props")
            (model,) = (await http.json("/v1/models"))["data"]
            ends = await http.json(_PATH, _ends_probe(tokenizer))
            cut = await http.json("/tokenize", {"content": _PROBE, "add_special": False, "parse_special": False})
            served = Served(
                props["build_info"],
                model["meta"]["n_vocab"],
                props["default_generation_settings"]["n_ctx"],
                str(props.get("model_ftype", "")) or "gguf",
                frozenset(one["token"] for one in ends["generation_settings/logit_bias"]),
            )
        except ServerFailed as exc:
            raise NotReady("it loads the model" if exc.status == 503 else str(exc)) from exc
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigurationError(
                f"the server at {http.url} does not answer like a llama-server that Forebay knows: {exc!r}"
            ) from exc
        if cut["tokens"] != tokenizer.encode(_PROBE, special_tokens=False):
            raise ConfigurationError(f"the server at {http.url} serves a model with another tokenizer")
        return served

    async def generate(self, http: Http, request: TokenRequest, served: Served) -> AsyncGenerator[Step, None]:
        """See `Dialect.generate`."""
        async with aclosing(http.events(_PATH, _body(request, served))) as events:
            async for event in events:
                yield _step(event, request)

    async def load(self, http: Http) -> Load:
        """See `Dialect.load`."""
        values = _metrics(await http.get("/metrics"))
        return Load(values.get("n_decode_total", 0))


def _ends_probe(tokenizer: Tokenizer) -> dict[str, Any]:
    # With ignore_eos, the answer names the tokens that it forbids: those that end an answer.
    fields = ["generation_settings/logit_bias"]
    return {"prompt": tokenizer.encode("The"), "n_predict": 1, "ignore_eos": True, "response_fields": fields}


def _body(request: TokenRequest, served: Served) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "prompt": [*request.prompt, *request.generated],
        "n_predict": request.max_new_tokens,
        "stream": True,
        "return_tokens": True,
        "response_fields": _FINAL_FIELDS,
        "samplers": _SAMPLERS,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": served.context_length,
    }
    if sampling.logprobs is not None:
        body["n_probs"] = max(1, sampling.logprobs)
    return body


def _step(event: Any, request: TokenRequest) -> Step:
    if "error" in event:
        raise ServerFailed("the server ended the answer with an error", event["error"].get("code"))
    if not event.get("stop"):
        return Step(tuple(event["tokens"]))
    finish: Literal["stop", "length"] = "stop" if event["stop_type"] == "eos" else "length"
    return Step((), finish=finish, cached_tokens=event.get("timings/cache_n", 0))


def _metrics(text: bytes) -> dict[str, int]:
    lines = (line.split() for line in text.decode().splitlines() if line.startswith("llamacpp:"))
    return {name.removeprefix("llamacpp:"): int(float(value)) for name, value in lines}
