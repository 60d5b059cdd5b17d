"""Prompts that come back with an answer: their tokens, and how likely these are."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from forebay_contracts.wire import frames
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.events import ResumeTokens, Tokens
from forebay_inference.engine.protocol import Scorer, TokenLogprob
from forebay_inference.engine.text.detokenizer import Decoder
from forebay_inference.engine.text.logprobs import with_text
from forebay_inference.engine.text.prepare import Prompt

MAX_TOKENS: Final = 128
"""Tokens of a prompt in one event: with 20 alternatives each, their frame stays well below NATS's `max_payload`."""

_Part = tuple[tuple[int, ...], tuple[frames.TokenLogprob, ...]]


async def returned(
    request: InferenceRequest,
    place: int,
    prompt: Prompt,
    scorer: Scorer,
    decoder: Decoder,
    bytes_of: Callable[[int], bytes],
    resume: ResumeTokens,
) -> AsyncGenerator[Tokens, None]:
    """The tokens of `prompt`, the request's number `place`, for each of its choices, but those that are in `resume`."""
    have = {index: len(resume.get(index, ())) for index in range(place * request.n, (place + 1) * request.n)}
    if min(have.values()) >= len(prompt.tokens):
        return
    start = 0
    async with aclosing(_parts(request, place, prompt, scorer, decoder, bytes_of)) as parts:
        async for tokens, logprobs in parts:
            for index, count in have.items():
                skip = max(count - start, 0)
                text = "" if start + skip else prompt.echo
                if skip < len(tokens):
                    yield Tokens(index, tokens[skip:], text, logprobs[skip:], prompt=True)
            start += len(tokens)


async def _parts(
    request: InferenceRequest,
    place: int,
    prompt: Prompt,
    scorer: Scorer,
    decoder: Decoder,
    bytes_of: Callable[[int], bytes],
) -> AsyncGenerator[_Part, None]:
    """At most MAX_TOKENS of the prompt at a time."""
    if request.prompt_logprobs is None:
        for start in range(0, len(prompt.tokens), MAX_TOKENS):
            yield tuple(prompt.tokens[start : start + MAX_TOKENS]), ()
        return
    given = request.prompts[place] if request.prompts else ""
    literal = given if isinstance(given, str) else ""
    part: list[frames.TokenLogprob] = []
    begun = False
    async with aclosing(_scored(scorer, request, place, prompt, request.prompt_logprobs)) as scored:
        async for one in scored:
            part.append(with_text(one, decoder, bytes_of, first=not begun, given=literal))
            begun = begun or bool(decoder.piece(one.token))
            if len(part) == MAX_TOKENS:
                yield tuple(entry.token for entry in part), tuple(part)
                part = []
    if part:
        yield tuple(entry.token for entry in part), tuple(part)


async def _scored(
    scorer: Scorer, request: InferenceRequest, place: int, prompt: Prompt, top: int
) -> AsyncGenerator[TokenLogprob, None]:
    yield TokenLogprob(prompt.tokens[0], None)
    scores = scorer.score(f"{request.id}/{place}", prompt.tokens, top, request.adapter or "")
    async with aclosing(scores) as parts:
        async for part in parts:
            for one in part:
                yield one
