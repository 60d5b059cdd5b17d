"""vLLM's OpenAI server, asked by `POST /v1/completions` with token ids.

Fields as in https://docs.vllm.ai/en/stable/serving/openai_compatible_server.html; tried with 0.32.
"""

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_inference.engine.protocol import Capabilities, Step, Tokenizer, TokenLogprob, TokenRequest
from forebay_inference.engine.served.dialect import MESSAGE_LENGTH, Load, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.vllm_common import command, identified, load, on_cpu
from forebay_inference.models.adapters import rank_of

_PATH: Final = "/v1/completions"
_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of --max-lora-rank."""
_MAX_LORAS: Final = 8
"""Adapters in one batch; each takes memory of the GPU. Others wait for a place, and are kept in the main memory."""

_SCORING_S: Final = 600.0
_GRAMMAR: Final = '%llguidance {}\nstart: %json {"enum": [1]}'
"""Accepted only by a server whose grammars are llguidance's."""


class VLLM:
    """See `Dialect`. The repetition penalty counts the tokens of the prompt, so it goes on with them."""

    name = "vLLM"
    package = "vllm"
    weights: Literal["gguf", "checkpoint"] = "checkpoint"
    capabilities = Capabilities(
        resumes="greedy",
        grammars="enforced",
        logprobs=True,
        prompt_logprobs=True,
        resumes_grammars=False,
        restarts=("presence_penalty", "frequency_penalty"),
        adapters=True,
    )

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """The server of the package `vllm` in the worker's own environment.

        Raises:
            ConfigurationError: MODEL_QUANTIZATION is one that vLLM does not make.
        """
        grammars = ("--structured-outputs-config.backend", "guidance")
        return command(settings, "--generation-config", "vllm", *grammars, "--enable-prompt-tokens-details")

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        served, models = await identified(http, tokenizer)
        if any(one.get("parent") for one in models):
            # A prompt's log probabilities end vLLM 0.32's CPU build then: its adapters expect a row a sequence.
            served = replace(served, capabilities=replace(self.capabilities, prompt_logprobs=False))
        await _refuse_other_grammars(http, tokenizer)
        return served

    def adapter_arguments(self, settings: InferenceSettings, adapters: Mapping[str, Path]) -> Sequence[str]:
        """See `AdapterDialect.adapter_arguments`."""
        # On a CPU, what has no adapter is computed with the one in the last place, which so stays empty.
        places = len(adapters) + 1 if on_cpu(settings) else min(len(adapters), _MAX_LORAS)
        rank = max(map(rank_of, adapters.values()))
        if rank > _RANKS[-1]:
            raise ConfigurationError(f"vLLM loads adapters of rank {_RANKS[-1]} at most, and one has {rank}")
        return [
            *("--enable-lora", "--max-lora-rank", str(next(one for one in _RANKS if one >= rank))),
            *("--max-loras", str(places), "--max-cpu-loras", str(max(places, len(adapters)))),
            *("--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())),
        ]

    async def adapters(
        self, http: Http, adapters: Mapping[str, Path], *, started: bool
    ) -> Mapping[str, Mapping[str, Any]]:
        """See `AdapterDialect.adapters`. The server's own names of them are those of `adapters`."""
        models = (await http.json("/v1/models"))["data"]
        loaded = {one["id"] for one in models if one.get("parent")} - {
            one["id"] for one in models if not one.get("parent")
        }
        if missing := sorted(adapters.keys() - loaded):
            raise ConfigurationError(f"the server at {http.url} has no LoRA adapter {', '.join(missing)}")
        return {"": {}} | {name: {"model": name} for name in adapters}

    async def generate(self, http: Http, request: TokenRequest, served: Served) -> AsyncGenerator[Step, None]:
        """See `Dialect.generate`."""
        last: Step | None = None
        cached = 0
        async with aclosing(http.events(_PATH, {**_body(request), **served.adapters[request.adapter]})) as events:
            async for event in events:
                if "error" in event:
                    raise _failed(event["error"])
                if not event["choices"]:  # behind the end
                    cached = _cached(event)
                elif (step := _step(event["choices"][0], request)).finish is None:
                    yield step
                else:
                    last = step
        if last is not None:
            yield last._replace(cached_tokens=cached)

    async def score(
        self, http: Http, id: str, prompt: Sequence[int], top: int, adapter: str, served: Served
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `ScoringDialect.score`. The server tells all of it at once."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        answer = await http.json(_PATH, {**body, **served.adapters[adapter]}, _SCORING_S)
        entries = answer["choices"][0]["prompt_logprobs"]
        yield tuple(_scored(token, told, top) for token, told in zip(prompt[1:], entries[1:], strict=True))

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return await load(http)


async def _refuse_other_grammars(http: Http, tokenizer: Tokenizer) -> None:
    try:
        body = {"prompt": tokenizer.encode("The"), "max_tokens": 1, "structured_outputs": {"grammar": _GRAMMAR}}
        await http.json(_PATH, body, _SCORING_S)
    except ServerFailed as exc:
        if exc.status != 400:
            raise
        raise ConfigurationError(
            f"the vLLM at {http.url} takes other grammars: start it with --structured-outputs-config.backend guidance"
        ) from exc


def _body(request: TokenRequest) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "prompt": [*request.prompt, *request.generated],
        "max_tokens": request.max_new_tokens,
        "min_tokens": min(max(sampling.min_tokens - len(request.generated), 0), request.max_new_tokens),
        "stop_token_ids": sorted(request.end_tokens),
        "ignore_eos": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p or 1e-9,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        # Seeds of their own slow the sampler down on a GPU, and without a seed nothing is promised.
        body["seed"] = int.from_bytes(hashlib.blake2b(request.seed.encode(), digest_size=8).digest()) >> 1
    if sampling.logit_bias:
        body["logit_bias"] = sampling.logit_bias
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if request.grammar is not None:
        body["structured_outputs"] = {"grammar": request.grammar.lark}
    return body


def _step(choice: Mapping[str, Any], request: TokenRequest) -> Step:
    tokens = tuple(choice["token_ids"])
    match choice["finish_reason"]:
        case None:
            finish: Literal["stop", "length"] | None = None
        case "stop" | "length" as finish:
            pass
        case other:
            raise ServerFailed(f"the answer ended with {other!r}")
    if (told := choice.get("logprobs")) is None:
        return Step(tokens, finish=finish)
    count = request.sampling.logprobs or 0
    entries = zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
    return Step(tokens, tuple(_logprob(token, logprob, top, count) for token, logprob, top in entries), finish)


def _logprob(token: int, logprob: float, told: Mapping[str, float], count: int) -> TokenLogprob:
    # The chosen token is told beside the best ones, if it is none of them.
    best = sorted(told.items(), key=lambda one: -one[1])[:count]
    return TokenLogprob(token, logprob, tuple((int(name.removeprefix("token_id:")), value) for name, value in best))


def _scored(token: int, told: Mapping[str, Mapping[str, Any]], count: int) -> TokenLogprob:
    best = sorted(told.items(), key=lambda one: int(one[1]["rank"]))[:count]
    own = told[str(token)]
    top = tuple((int(name), float(one["logprob"])) for name, one in best)
    return TokenLogprob(token, own["logprob"], top, own["rank"])


def _cached(event: Mapping[str, Any]) -> int:
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _failed(error: Mapping[str, Any]) -> ServerFailed | InvalidRequest:
    if error.get("code") == 400:
        return InvalidRequest(f"The engine refuses the request: {str(error.get('message'))[:MESSAGE_LENGTH]}")
    return ServerFailed(f"the answer ended with an error ({error.get('type')})", error.get("code"))
