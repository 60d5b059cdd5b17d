"""`best_of`: more choices are generated than shown, and the likeliest are kept."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Tokens


@dataclass(slots=True)
class _Candidate:
    events: list[Tokens] = field(default_factory=list)
    end: Finished | None = None

    @property
    def score(self) -> float:
        """The mean log probability of a token, as the OpenAI reference has it."""
        logprobs = [entry.logprob for event in self.events for entry in event.logprobs]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0


def widened(request: InferenceRequest) -> InferenceRequest:
    """The request that generates every candidate, with the log probabilities that they are ranked by."""
    sampling = request.sampling.model_copy(update={"logprobs": request.sampling.logprobs or 0})
    return request.model_copy(update={"n": request.best_of, "best_of": None, "sampling": sampling})


async def best(
    events: AsyncGenerator[Event, None], request: InferenceRequest, resume: ResumeTokens
) -> AsyncGenerator[Event, None]:
    """The events of the best `request.n` choices of each prompt, out of those of `widened(request)`."""
    of = request.best_of or request.n
    candidates: dict[int, _Candidate] = {}
    async with aclosing(events):
        async for event in events:
            match event:
                case Accepted():
                    yield event
                case Tokens():
                    candidates.setdefault(event.index, _Candidate()).events.append(event)
                case Finished():
                    candidates.setdefault(event.index, _Candidate()).end = event
    for prompt in range(len(candidates) // of):
        group = [candidates[prompt * of + offset] for offset in range(of)]
        group.sort(key=lambda candidate: candidate.score, reverse=True)
        for place, candidate in enumerate(group[: request.n]):
            for event in _renumbered(candidate, prompt * request.n + place, request, resume):
                yield event


def _renumbered(candidate: _Candidate, index: int, request: InferenceRequest, resume: ResumeTokens) -> list[Event]:
    # The same seed makes the same candidates again: what a client has already is the beginning of them.
    skip = len(resume.get(index, ()))
    shown: list[Event] = []
    for event in candidate.events:
        if skip:
            skip -= min(skip, len(event.token_ids))
            continue
        logprobs = event.logprobs if request.sampling.logprobs is not None else ()
        shown.append(Tokens(index, event.token_ids, event.text, logprobs, event.tool_calls))
    if candidate.end is not None:
        shown.append(Finished(index, candidate.end.finish_reason, candidate.end.cached_tokens))
    return shown
