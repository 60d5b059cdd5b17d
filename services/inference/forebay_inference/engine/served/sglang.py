"""SGLang's server, asked by `POST /generate` with token ids.

Written after its source (`io_struct.py`, `tokenizer_manager.py`, `sampling_params.py` of sglang 0.5); no test has run
against the server itself.
"""

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_inference.engine.protocol import Capabilities, Step, Tokenizer, TokenRequest
from forebay_inference.engine.served.dialect import MESSAGE_LENGTH, PROBE, Load, NotReady, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.metrics import samples

_PATH: Final = "/generate"
_WHOLE_VOCABULARY: Final = -1
_TOKENS: Final = "sglang:generation_tokens_total"
_USAGE: Final = "sglang:token_usage"


class SGLang:
    """See `Dialect`. Its log probabilities are those after penalties and temperature, so none are offered."""

    name = "SGLang"
    package = "sglang"
    weights: Literal["gguf", "checkpoint"] = "checkpoint"
    capabilities = Capabilities(
        resumes="greedy",
        grammars="enforced",
        logprobs=False,
        resumes_grammars=False,
        restarts=("presence_penalty", "frequency_penalty", "repetition_penalty"),
    )

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """The server of the package `sglang` in the worker's own environment.

        Raises:
            ConfigurationError: MODEL_QUANTIZATION is one that SGLang does not make.
        """
        return command(
            settings, "--grammar-backend", "llguidance", "--enable-metrics", "--incremental-streaming-output"
        )

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        served, backend = await identified(http, tokenizer)
        if backend not in (None, "llguidance"):
            raise ConfigurationError(
                f"the SGLang at {http.url} takes other grammars: start it with --grammar-backend llguidance"
            )
        return served

    async def generate(self, http: Http, request: TokenRequest, served: Served) -> AsyncGenerator[Step, None]:
        """See `Dialect.generate`."""
        taken = 0
        last: Step | None = None
        async with aclosing(http.events(_PATH, _body(request))) as events:
            async for event in events:
                if "error" in event:
                    raise InvalidRequest(
                        f"The engine refuses the request: {str(event['error'].get('message'))[:MESSAGE_LENGTH]}"
                    )
                told = event["meta_info"]
                # The ids are those since the last event or, without --incremental-streaming-output, all of them.
                new = int(told["completion_tokens"]) - taken
                taken += new
                tokens = tuple(event["output_ids"][-new:]) if new else ()
                if finish := _finish(told["finish_reason"]):
                    last = Step(tokens, finish=finish, cached_tokens=told.get("cached_tokens") or 0)
                else:
                    yield Step(tokens)
        if last is not None:
            yield last

    async def load(self, http: Http) -> Load:
        """See `Dialect.load`."""
        found = samples(await http.get("/metrics"), (_TOKENS, _USAGE))
        return Load(int(sum(found[_TOKENS])), max(found[_USAGE]) if found[_USAGE] else None)


def command(settings: InferenceSettings, *options: str) -> Sequence[str]:
    """What starts the server of the package `sglang`; raises ConfigurationError for a quantization it does not make."""
    if settings.model_quantization not in ("auto", "none"):
        wanted = settings.model_quantization
        raise ConfigurationError(f"MODEL_QUANTIZATION={wanted} cannot be had from SGLang: use auto or none")
    return [
        *("{python}", "-m", "sglang.launch_server", "--model-path", "{model}", "--served-model-name", "{name}"),
        *("--host", "127.0.0.1", "--port", "{port}", "--max-running-requests", "{slots}", *options),
    ]


async def identified(http: Http, tokenizer: Tokenizer, *, special_tokens: bool = False) -> tuple[Served, str | None]:
    """What the server says that it serves, and its grammar backend; see `ServerDialect.identify`."""
    try:
        model = (await http.json("/v1/models"))["data"][0]
        info = await http.json("/get_server_info")
        await http.get("/metrics")
        cut = await http.json("/tokenize", {"prompt": PROBE, "add_special_tokens": special_tokens})
        context_length = int(model["max_model_len"])
        same = cut["tokens"] == tokenizer.encode(PROBE, special_tokens=special_tokens)
        backend = info.get("grammar_backend")
    except ServerFailed as exc:
        if exc.status is not None and exc.status < 500:
            hint = "; start it with --enable-metrics" if "/metrics" in str(exc) else ""
            raise ConfigurationError(f"the server at {http.url}: {exc}{hint}") from exc
        raise NotReady(str(exc)) from exc
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigurationError(f"the server at {http.url} does not answer like SGLang: {exc!r}") from exc
    if not same:
        raise ConfigurationError(f"the server at {http.url} serves a model with another tokenizer")
    quantization = str(info.get("quantization") or "none")
    return Served(str(info.get("version")), tokenizer.vocabulary_size, context_length, quantization), backend


def _body(request: TokenRequest) -> dict[str, Any]:
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "min_new_tokens": min(max(sampling.min_tokens - len(request.generated), 0), request.max_new_tokens),
        "stop_token_ids": sorted(request.end_tokens),
        # Without EOS it heeds no stop token either: then the engine ends the answer at these.
        "ignore_eos": sampling.ignore_eos and request.grammar is None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p or 1e-9,
        "top_k": sampling.top_k or _WHOLE_VOCABULARY,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.seed is not None:
        # It counts only where the server runs with --enable-deterministic-inference.
        params["sampling_seed"] = int.from_bytes(hashlib.blake2b(request.seed.encode(), digest_size=4).digest()) >> 1
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if request.grammar is not None:
        params["ebnf"] = request.grammar.lark
    return {"input_ids": [*request.prompt, *request.generated], "sampling_params": params, "stream": True}


def _finish(reason: Mapping[str, Any] | None) -> Literal["stop", "length"] | None:
    if reason is None:
        return None
    match reason["type"]:
        case "stop":
            return "stop"
        case "length":
            return "length"
        case "abort" if reason.get("status_code") == 400:
            raise InvalidRequest(f"The engine refuses the request: {str(reason.get('message'))[:MESSAGE_LENGTH]}")
        case other:
            raise ServerFailed(f"the answer ended with {other!r}", reason.get("status_code"))
