"""A model that answers in text: prompts made of requests, and the text of the tokens that an engine generates."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from operator import attrgetter
from typing import Any, Final

from forebay_contracts.wire.request import GENERATION, CompletionType, InferenceRequest, Sampling
from forebay_inference.engine.events import Accepted, Event, ResumeTokens
from forebay_inference.engine.protocol import (
    Engine,
    EngineFault,
    EngineStatus,
    LoadedModel,
    SamplingParameters,
    Step,
    TokenRequest,
)
from forebay_inference.engine.text.best_of import best, widened
from forebay_inference.engine.text.choice import Choice, ChoiceText
from forebay_inference.engine.text.detokenizer import Decoder
from forebay_inference.engine.text.embeddings import EmbeddingModel
from forebay_inference.engine.text.merged import merged
from forebay_inference.engine.text.prepare import Prepared, prepare
from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import ToolFormat, format_of

# What the wire and an engine call by the same names, which is all but seed and grammar.
_sampling_fields: Final[Callable[[Sampling], tuple[Any, ...]]] = attrgetter(*SamplingParameters._fields[:-2])


class TextModel:
    """Serves chats and completions from `engine` (see `Model`), and embeddings from `embeddings`, where it is given."""

    def __init__(self, engine: Engine, embeddings: EmbeddingModel | None = None) -> None:
        self.engine = engine
        self.completion_types = (*GENERATION, *(embeddings.completion_types if embeddings is not None else ()))
        self._embeddings = embeddings
        self._serving: _Serving | None = None
        # Tokenizing a long prompt or checking a grammar takes a while; one thread keeps it off the event loop.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """See `Model.start`."""
        if self._embeddings is not None:
            await self._embeddings.start(progress)
        loaded = await self.engine.start(progress)
        self._serving = _Serving(loaded)
        return loaded

    def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[Event, None]:
        """See `Model.generate`."""
        if self._embeddings is not None and request.completion_type is CompletionType.EMBEDDING:
            return self._embeddings.generate(request, resume)
        can = self.engine.capabilities
        ranked = can.logprobs and not request.stream and (request.best_of or 0) > request.n
        if any(resume.values()) and (can.resumes == "no" or (ranked and can.resumes != "exact")):
            raise EngineFault("the engine cannot go on with the tokens of an earlier attempt")
        if ranked:
            return best(self._choices(widened(request), {}), request, resume)
        return self._choices(request, resume)

    async def _choices(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[Event, None]:
        serving = self._serving
        if serving is None:
            raise EngineFault("the engine is not started, or closed")
        if (fault := self.fault()) is not None:
            raise EngineFault(f"the engine serves nothing: {fault}")
        loaded = serving.loaded
        if loaded.recommended:
            request = request.model_copy(update={"sampling": request.sampling.settled(loaded.recommended)})
        work = partial(prepare, request, loaded, self.engine.capabilities, serving.tool_format)
        if loaded.encodes_quickly:
            prepared = work()
        else:
            prepared = await asyncio.get_running_loop().run_in_executor(self._preparing, work)
        yield Accepted(prepared.prompt_tokens)
        running: list[AsyncGenerator[Event, None]] = []
        for index in range(len(prepared.prompts) * request.n):
            choice = serving.choice(request, prepared, index)
            choice.replay(resume.get(index, ()))
            if choice.finish_reason is None:
                running.append(_follow(choice, self.engine.generate(_sequence(request, prepared, choice))))
                continue
            if (echo := choice.advance(Step(()))) is not None:
                yield echo
            yield choice.finished()
        async with aclosing(running[0] if len(running) == 1 else merged(running)) as events:
            async for event in events:
                yield event

    def fault(self) -> str | None:
        """See `Model.fault`."""
        return self.engine.status().fault

    def load(self) -> EngineStatus:
        """See `Model.load`."""
        return self.engine.status()

    async def close(self) -> None:
        """See `Model.close`."""
        self._serving = None
        self._preparing.shutdown(wait=False, cancel_futures=True)
        if self._embeddings is not None:
            await self._embeddings.close()
        await self.engine.close()


class _Serving:
    """What the text layer keeps of a model that is loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.tool_format: ToolFormat = format_of(loaded.tokenizer)
        self._decoder = Decoder(loaded.tokenizer.decode)
        # In some families the marker that begins a call is a special token, which answers do not show.
        markers = () if self.tool_format.start_token is None else (self.tool_format.start_token,)
        self._decoder_with_markers = (
            Decoder(partial(loaded.tokenizer.decode, show=markers)) if markers else self._decoder
        )

    def choice(self, request: InferenceRequest, prepared: Prepared, index: int) -> Choice:
        """Choice `index` of `request`, at its beginning."""
        tools, parser, decoder = prepared.tools, None, self._decoder
        if tools is not None:
            decoder = self._decoder_with_markers
            seed = f"{request.id}:{index}"
            # An answer that has a schema is a value of it or calls, and not first the one and then the other.
            calls_first = request.response_format is not None
            parser = ToolParser(self.tool_format, tools.names, seed, calls_first=calls_first)
        prompt = index // request.n
        return Choice(
            index,
            ChoiceText(decoder, request.sampling.stop, parser),
            decoder.decode,
            self.loaded.tokenizer.bytes_of,
            prepared.end_tokens,
            prepared.limits[prompt],
            prepared.echoes[prompt],
        )


def _sequence(request: InferenceRequest, prepared: Prepared, choice: Choice) -> TokenRequest:
    """What an engine is asked for, to go on with `choice`."""
    sampling = request.sampling
    # Without a seed the request's id is one: a second attempt then goes on like the first.
    seed = request.id if sampling.seed is None else sampling.seed
    return TokenRequest(
        id=f"{request.id}/{choice.index}",
        prompt=prepared.prompts[choice.index // request.n],
        max_new_tokens=choice.limit - len(choice.tokens),
        sampling=SamplingParameters._make((*_sampling_fields(sampling), f"{seed}:{choice.index}", prepared.grammar)),
        generated=choice.tokens.copy(),
        end_tokens=prepared.end_tokens,
    )


async def _follow(choice: Choice, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[Event, None]:
    """The events of one choice, whose tokens come in `steps`."""
    async with aclosing(steps):
        async for step in steps:
            if (event := choice.advance(step)) is not None:
                yield event
            if choice.finish_reason is not None:
                yield choice.finished()
                return
    raise EngineFault("the engine stopped in the middle of an answer")
