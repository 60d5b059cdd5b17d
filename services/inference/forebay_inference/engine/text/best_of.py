"""`best_of`: more choices are generated than shown, and the likeliest are kept."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Tokens


def widened(request: InferenceRequest) -> InferenceRequest:
    """The request that generates every candidate, with the log probabilities that they are ranked by."""
    sampling = request.sampling.model_copy(update={"logprobs": request.sampling.logprobs or 0})
    return request.model_copy(update={"n": request.best_of, "best_of": None, "sampling": sampling})


async def best(
    events: AsyncGenerator[Event, None], request: InferenceRequest, resume: ResumeTokens
) -> AsyncGenerator[Event, None]:
    """The events of the best `request.n` choices of each prompt, out of those of `widened(request)`."""
    of = request.best_of or request.n
    candidates: defaultdict[int, list[Tokens | Finished]] = defaultdict(list)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Tokens | Finished):
                candidates[event.index].append(event)
            elif isinstance(event, Accepted):
                yield replace(event, returned=event.returned // of * request.n)
    for prompt in range(len(candidates) // of):
        group = sorted((candidates[prompt * of + offset] for offset in range(of)), key=_score, reverse=True)
        for place, candidate in enumerate(group[: request.n]):
            index = prompt * request.n + place
            # The same seed makes the same candidates again: what a client has already is the beginning of them.
            have = len(resume.get(index, ()))
            for event in candidate:
                if isinstance(event, Tokens) and have > 0:
                    have -= len(event.token_ids)
                elif isinstance(event, Tokens) and not event.prompt and request.sampling.logprobs is None:
                    yield replace(event, index=index, logprobs=())
                else:
                    yield replace(event, index=index)


def _score(candidate: Sequence[Tokens | Finished]) -> float:
    """The mean log probability of a token, as the OpenAI reference has it."""
    answer = (event for event in candidate if isinstance(event, Tokens) and not event.prompt)
    logprobs = [entry.logprob or 0.0 for event in answer for entry in event.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
