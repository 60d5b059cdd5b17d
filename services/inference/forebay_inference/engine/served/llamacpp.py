"""llama.cpp's server: `llama-server`, or the same from the wheel `xllamacpp`."""

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import (
    Capabilities,
    EngineFault,
    Step,
    Tokenizer,
    TokenLogprob,
    TokenRequest,
)
from forebay_inference.engine.served.dialect import Load, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.llama_common import command, explained, facts, load
from forebay_inference.engine.served.llama_lora import lora_fields

_PATH: Final = "/completion"
_LLGUIDANCE: Final = "%llguidance {}\n"
# Ours, in our order. llama.cpp has others, which are off.
_SAMPLERS: Final = ("penalties", "temperature", "top_k", "top_p", "min_p")
# The same at temperature 0, without a pass over the whole vocabulary by each sampler: 0.4 ms a token.
_GREEDY: Final = {"samplers": ("penalties", "top_k"), "top_k": 1}
_END_FIELDS: Final = ("stop", "stop_type", "tokens", "tokens_predicted", "timings/cache_n", "completion_probabilities")
# Raises the score of one token above all others, so that an answer is that token.
_CERTAIN: Final = 10_000.0


class LlamaCpp:
    """See `Dialect`.

    llama.cpp counts the tokens of the prompt in the presence and the frequency penalty, unlike OpenAI.
    """

    name = "llama.cpp"
    package = "xllamacpp"
    weights: Literal["gguf", "checkpoint"] = "gguf"
    capabilities = Capabilities(
        resumes="greedy",
        grammars="enforced",
        logprobs=True,
        resumes_grammars=False,
        refused=("presence_penalty", "frequency_penalty", "min_tokens"),
        adapters=True,
    )

    def __init__(self) -> None:
        self._identified: Tokenizer | None = None

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """The server of the wheel `xllamacpp`, in a process of its own."""
        return command(settings)

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """See `ServerDialect.identify`."""
        self._identified = tokenizer
        async with explained(http):
            served = await facts(http, tokenizer)
            can = replace(self.capabilities, grammars="enforced" if await self._guides(http) else "no")
            return replace(served, end_tokens=await self._ends(http), capabilities=can)

    async def _ends(self, http: Http) -> frozenset[int]:
        """The tokens that end an answer: those that `ignore_eos` forbids."""
        asked = "generation_settings/logit_bias"
        answer = await http.json(_PATH, self._short(1) | {"ignore_eos": True, "response_fields": [asked]}, None)
        return frozenset(one["token"] for one in answer[asked])

    async def _guides(self, http: Http) -> bool:
        """Whether it was built with llguidance."""
        try:
            guided = self._short(4) | {"grammar": f'{_LLGUIDANCE}start: "7"', "response_fields": ["content"]}
            return bool((await http.json(_PATH, guided, None))["content"] == "7")
        except ServerFailed as exc:
            if exc.status is None:
                raise
            return False

    def _short(self, count: int) -> dict[str, Any]:
        return {"prompt": self._tokenizer.encode("The"), "n_predict": count}

    def adapter_arguments(self, settings: InferenceSettings, adapters: Mapping[str, Path]) -> Sequence[str]:
        """See `AdapterDialect.adapter_arguments`."""
        # The cache of earlier prompts does not tell adapters apart: one would go on with what another has computed.
        files = [word for file in adapters.values() for word in ("--lora", str(file))]
        return [*files, "--lora-init-without-apply", "--cache-ram", "0"]

    async def adapters(
        self, http: Http, adapters: Mapping[str, Path], *, started: bool
    ) -> Mapping[str, Mapping[str, Any]]:
        """See `AdapterDialect.adapters`."""
        return lora_fields(http.url, await http.json("/lora-adapters"), adapters, started=started)

    async def generate(self, http: Http, request: TokenRequest, served: Served) -> AsyncGenerator[Step, None]:
        """See `Dialect.generate`."""
        matcher = None if request.grammar is None else request.grammar.matcher.deep_copy()
        answer = _Answer(request, self._tokenizer, served.adapters[request.adapter])
        while True:
            untold, last = 0, None
            async with aclosing(http.events(_PATH, _body(answer.rest(), served))) as events:
                async for event in events:
                    step = answer.step(event)
                    if step is None:
                        untold = answer.untold(event)
                        break
                    if matcher is not None and not _follows(matcher, step.tokens, request.end_tokens):
                        raise EngineFault("the answer of the server leaves its grammar")
                    if request.sampling.logprobs is not None and len(step.logprobs) < len(step.tokens):
                        step = step._replace(logprobs=await self._logprobs(http, answer, step))
                    if step.finish is None:
                        yield step
                    else:
                        last = step
            if not untold:
                if last is not None:
                    yield last
                return
            if matcher is not None:
                raise EngineFault("the server did not tell the tokens of an answer that follows a grammar")
            # Generated once more, where none is left out.
            body = _body(answer.rest(), served) | {"stream": False, "n_predict": untold}
            step = answer.whole(await http.json(_PATH, body, None))
            if request.sampling.logprobs is not None:
                step = step._replace(logprobs=await self._logprobs(http, answer, step))
            yield step
            if step.finish is not None:
                return

    async def _logprobs(self, http: Http, answer: "_Answer", step: Step) -> tuple[TokenLogprob, ...]:
        """Those of all tokens of `step`, of which the server has not told some, since they are parts of a character."""
        told = {entry.token: entry for entry in step.logprobs}
        known = [*answer.request.prompt, *answer.tokens[: -len(step.tokens)]]
        found = []
        for token in step.tokens:
            found.append(told.get(token) or await self._logprob(http, answer, known, token))
            known.append(token)
        return tuple(found)

    async def _logprob(self, http: Http, answer: "_Answer", known: Sequence[int], token: int) -> TokenLogprob:
        """That of `token` after `known`: whatever the server chooses there, it tells the likeliest ones."""
        (told,) = self._tokenizer.encode("a", special_tokens=False)[:1]
        for count in (100, self._tokenizer.vocabulary_size):
            body = {"prompt": known, "n_predict": 1, "n_probs": count, "logit_bias": [[told, _CERTAIN]]}
            body |= {"response_fields": ["completion_probabilities"], **answer.adapter}
            (place,) = (await http.json(_PATH, body, None))["completion_probabilities"]
            best = [(one["id"], one["logprob"]) for one in place["top_logprobs"]]
            if (logprob := dict(best).get(token)) is not None:
                return TokenLogprob(token, logprob, tuple(best[: answer.request.sampling.logprobs or 0]))
        raise ServerFailed("the server tells no log probability of a token")

    async def load(self, http: Http) -> Load:
        """See `ServerDialect.load`."""
        return await load(http)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._identified is None:
            raise EngineFault("the server is not identified")
        return self._identified


class _Answer:
    """Follows one sequence. `tokens` are those that were told, with the ones of an earlier attempt. For `adapter` see
    `Served.adapters`.

    The server streams an event a token. But it leaves out a token after which a character is incomplete, and tells its
    text and its count with the next one.
    """

    def __init__(self, request: TokenRequest, tokenizer: Tokenizer, adapter: Mapping[str, Any]) -> None:
        self.request = request
        self.adapter = adapter
        self.tokens = list(request.generated)
        self._tokenizer = tokenizer
        self._streamed = 0
        self._streams = 0

    def rest(self) -> TokenRequest:
        """What is still to be generated, in a new stream."""
        self._streamed = 0
        self._streams += 1
        done = len(self.tokens) - len(self.request.generated)
        return self.request._replace(generated=self.tokens, max_new_tokens=self.request.max_new_tokens - done)

    def step(self, event: Any) -> Step | None:
        """The step of `event`, None if it does not tell all tokens until then."""
        if "error" in event:
            raise ServerFailed("the server ended the answer with an error", event["error"].get("code"))
        if event["stop"]:
            return None if self.untold(event) else Step((), (), _finish(event), self._cached(event))
        tokens = event["tokens"]
        if (untold := self.untold(event)) > 0:
            cut = self._tokenizer.encode(event["content"], special_tokens=False)
            # Bytes that are no character come as U+FFFD.
            if "\ufffd" in event["content"] or cut[untold:] != tokens or len(cut) != untold + len(tokens):
                return None
            tokens = cut
        self._streamed += len(tokens)
        self.tokens += tokens
        probabilities = event.get("completion_probabilities")
        return Step(tuple(tokens), () if probabilities is None else self._logprobs(probabilities))

    def _cached(self, event: Any) -> int:
        """Tokens of the prompt; a further stream has what the ones before it computed in its cache too."""
        return min(event.get("timings/cache_n", 0), len(self.request.prompt)) if self._streams == 1 else 0

    def untold(self, event: Any) -> int:
        """How many tokens were left out before those of `event`."""
        return int(event["tokens_predicted"]) - self._streamed - len(event["tokens"])

    def whole(self, answer: Any) -> Step:
        """The step of an answer that was not streamed."""
        tokens = answer["tokens"]
        self.tokens += tokens
        left = self.request.max_new_tokens - (len(self.tokens) - len(self.request.generated))
        finish = _finish(answer) if answer["stop_type"] == "eos" or left <= 0 else None
        return Step(tuple(tokens), (), finish)

    def _logprobs(self, probabilities: Any) -> tuple[TokenLogprob, ...]:
        count = self.request.sampling.logprobs or 0
        return tuple(
            TokenLogprob(
                one["id"], one["logprob"], tuple((best["id"], best["logprob"]) for best in one["top_logprobs"][:count])
            )
            for one in probabilities
        )


def _follows(matcher: Any, tokens: Sequence[int], ends: frozenset[int]) -> bool:
    """Whether the grammar allows `tokens` next. llama.cpp goes on without a grammar that it cannot follow."""
    return all(matcher.is_accepting() if token in ends else matcher.consume_token(token) for token in tokens)


def _finish(event: Any) -> Literal["stop", "length"]:
    return "stop" if event["stop_type"] == "eos" else "length"


def _body(request: TokenRequest, served: Served) -> dict[str, Any]:
    sampling, seed = request.sampling, f"{request.seed}:{len(request.generated)}".encode()
    body: dict[str, Any] = {
        "prompt": [*request.prompt, *request.generated],
        "n_predict": request.max_new_tokens,
        "stream": True,
        "return_tokens": True,
        "response_fields": _END_FIELDS,
        "samplers": _SAMPLERS,
        "seed": int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest()) >> 1,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "ignore_eos": served.end_tokens.isdisjoint(request.end_tokens),
        **served.adapters[request.adapter],
    }
    if sampling.temperature == 0:
        body |= _GREEDY
    if sampling.repetition_penalty != 1.0:
        body |= {"repeat_penalty": sampling.repetition_penalty, "repeat_last_n": served.context_length}
    if sampling.logit_bias:
        body["logit_bias"] = list(sampling.logit_bias.items())
    if request.grammar is not None:
        body["grammar"] = _LLGUIDANCE + request.grammar.lark
    if sampling.logprobs is not None:
        body["n_probs"] = max(1, sampling.logprobs)
    return body
