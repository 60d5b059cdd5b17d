"""A model that is asked in text: prompts made of requests, and the text of the tokens that an engine generates."""

import asyncio
import math
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import cached_property, partial
from typing import TypeVar, cast

from forebay_contracts.wire.errors import AdapterNotFound, InferenceFailed, InvalidRequest, UnsupportedByModel
from forebay_contracts.wire.request import GENERATION, POOLING, CompletionType, InferenceRequest
from forebay_contracts.wire.state import Usage
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Tokens, Used, Vector
from forebay_inference.engine.model import CANNOT_RESUME
from forebay_inference.engine.protocol import (
    Capabilities,
    Embedder,
    Engine,
    EngineFault,
    EngineStatus,
    LoadedModel,
    Reranker,
    Scorer,
    Step,
    TokenRequest,
)
from forebay_inference.engine.text.best_of import best, widened
from forebay_inference.engine.text.choice import Choice
from forebay_inference.engine.text.detokenizer import Decoder
from forebay_inference.engine.text.embeddings import added_tokens, encode_inputs
from forebay_inference.engine.text.harmony import EFFORTS, Harmony, HarmonyParser, harmony_of
from forebay_inference.engine.text.merged import merged
from forebay_inference.engine.text.prepare import Prepared, given, prepare
from forebay_inference.engine.text.reasoning import AnswerParser, Thinking, ThinkingParser, thinking_of
from forebay_inference.engine.text.returned import returned
from forebay_inference.engine.text.templates import Chat
from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import format_of

T = TypeVar("T")

_BROKEN_OFF = "the engine stopped in the middle of an answer"


class TextModel:
    """Answers chats and completions from an Engine, embeddings from an Embedder, and reranks with a Reranker; `engine`
    may be each of them.

    For `completion_types` and `adapters` see `Model`. `closed_schemas` is the setting of that name.
    """

    def __init__(self, engine: Engine | Embedder | Reranker, *, closed_schemas: bool = True) -> None:
        self.engine = engine
        self._generator = engine if isinstance(engine, Engine) else None
        self._embedder = engine if isinstance(engine, Embedder) else None
        self._reranker = engine if isinstance(engine, Reranker) else None
        self.completion_types: tuple[CompletionType, ...] = (
            *(GENERATION if self._generator is not None else ()),
            *((CompletionType.EMBEDDING,) if self._embedder is not None else ()),
            *((CompletionType.RERANK,) if self._reranker is not None else ()),
        )
        self.adapters = self._generator is not None and self._generator.capabilities.adapters
        self._serving: _Serving | None = None
        self._closed_schemas = closed_schemas
        # To tokenize a long prompt or to compile a grammar takes long, which is done beside the event loop. A grammar
        # that takes seconds does not hold up the next request.
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """See `Model.start`."""
        loaded = await self.engine.start(progress)
        self._serving = _Serving(loaded)
        return loaded

    def can_resume(self, request: InferenceRequest) -> bool:
        """See `Model.can_resume`. The answer to `best_of` is told at its end, so nothing of it would be kept. Scores
        are computed again."""
        if request.completion_type in POOLING or self._generator is None:
            return request.completion_type is not CompletionType.RERANK
        can = self._generator.capabilities
        if (request.best_of or 0) > request.n or not _can_go_on(request, can, ranked=False):
            return False
        return can.resumes_grammars or not (request.response_format or request.tools)

    def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[Event, None]:
        """See `Model.generate`."""
        if request.adapter is not None and request.adapter not in self._ready().loaded.adapters:
            raise AdapterNotFound(request.model, request.adapter)
        wanted, engine = request.completion_type, self._generator
        if wanted in POOLING and request.adapter is not None:
            raise InvalidRequest("Embeddings and scores are not computed with an adapter.", param="model")
        if wanted is CompletionType.EMBEDDING and self._embedder is not None:
            return self._vectors(self._embedder, request, resume)
        if wanted is CompletionType.RERANK and self._reranker is not None:
            return self._scores(self._reranker, request, resume)
        if wanted in POOLING or engine is None:
            raise UnsupportedByModel(request.model, request.completion_type, self.completion_types)
        can = engine.capabilities
        ranked = can.logprobs and not request.stream and (request.best_of or 0) > request.n
        if any(resume.values()) and not _can_go_on(request, can, ranked=ranked):
            raise InferenceFailed(CANNOT_RESUME)
        if ranked:
            return best(self._choices(engine, widened(request), {}), request, resume)
        return self._choices(engine, request, resume)

    async def _choices(
        self, engine: Engine, request: InferenceRequest, resume: ResumeTokens
    ) -> AsyncGenerator[Event, None]:
        serving = self._ready()
        loaded = serving.loaded
        if loaded.recommended:
            request = request.model_copy(update={"sampling": request.sampling.settled(loaded.recommended)})
        work = partial(
            prepare,
            request,
            loaded,
            engine.capabilities,
            serving.tool_format,
            serving.chat,
            serving.reasoning,
            serving.decoder,
            closed_schemas=self._closed_schemas,
        )
        prepared = work() if _length(request) < loaded.quick_length else await self._in_thread(work)
        if prepared.grammar is not None and any(resume.values()) and not engine.capabilities.resumes_grammars:
            raise InferenceFailed(CANNOT_RESUME)
        lengths = [0] * len(prepared.prompts)
        if request.return_prompt:
            lengths = [len(prompt.tokens) for prompt in prepared.prompts]
        yield Accepted(prepared.prompt_tokens, sum(lengths) * request.n)
        if request.return_prompt:
            async with aclosing(merged(serving.returned(engine, request, prepared, resume))) as prompts:
                async for part in prompts:
                    yield part
        running: list[tuple[Choice, AsyncGenerator[Step, None]]] = []
        for index in range(len(prepared.prompts) * request.n):
            choice = serving.choice(request, prepared, index)
            choice.replay(resume.get(index, ())[lengths[index // request.n] :])
            if choice.finish_reason is None:
                running.append((choice, engine.generate(_sequence(request, prepared, choice))))
                continue
            if (echo := choice.advance(Step(()))) is not None:
                yield echo
            yield choice.finished()
        if len(running) != 1:
            async with aclosing(merged([_follow(choice, steps) for choice, steps in running])) as events:
                async for one in events:
                    yield one
            return
        # What `_follow` does, without one more generator: 20 tokens take 72 us instead of 84.
        ((choice, steps),) = running
        async with aclosing(steps):
            async for step in steps:
                if (event := choice.advance(step)) is not None:
                    yield event
                if choice.finish_reason is not None:
                    yield choice.finished()
                    return
        raise EngineFault(_BROKEN_OFF)

    async def _vectors(
        self, embedder: Embedder, request: InferenceRequest, resume: ResumeTokens
    ) -> AsyncGenerator[Event, None]:
        serving = self._ready()
        loaded = serving.loaded
        work = partial(encode_inputs, request, loaded, serving.added_tokens)
        inputs = work() if _length(request) < loaded.quick_length else await self._in_thread(work)
        yield Accepted(sum(map(len, inputs)))
        for index in resume:
            yield Finished(index, "stop")
        missing = {index: tokens for index, tokens in enumerate(inputs) if index not in resume}
        async with aclosing(embedder.embed(missing, request.dimensions)) as vectors:
            async for index, values in vectors:
                _refuse_infinite(struct.unpack(f"<{len(values) // 4}f", values))
                yield Vector(index, values)
                yield Finished(index, "stop")

    async def _scores(
        self, reranker: Reranker, request: InferenceRequest, resume: ResumeTokens
    ) -> AsyncGenerator[Event, None]:
        self._ready()
        yield Accepted(0)
        # What the client has is computed again, since only that tells its tokens.
        query, *documents = map(str, request.prompts)
        tokens = 0
        async with aclosing(reranker.rerank(query, dict(enumerate(documents)))) as parts:
            async for scores, taken in parts:
                tokens += taken
                _refuse_infinite(scores.values())
                for index, score in scores.items():
                    if index not in resume:
                        yield Vector(index, struct.pack("<f", score))
                    yield Finished(index, "stop")
        yield Used(Usage(prompt_tokens=tokens))

    def _ready(self) -> "_Serving":
        if self._serving is None:
            raise EngineFault("the engine is not started, or closed")
        if (fault := self.status().fault) is not None:
            raise EngineFault(f"the engine serves nothing: {fault}")
        return self._serving

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def status(self) -> EngineStatus:
        """See `Model.status`."""
        return self.engine.status()

    async def close(self) -> None:
        """See `Model.close`."""
        self._serving = None
        self._preparing.shutdown(wait=False, cancel_futures=True)
        await self.engine.close()


class _Serving:
    """What the text layer keeps of a model that is loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.tool_format = form = format_of(loaded.tokenizer)
        self.reasoning = harmony_of(loaded.tokenizer) or thinking_of(loaded.tokenizer)
        self.chat = Chat(loaded.tokenizer, form, EFFORTS if isinstance(self.reasoning, Harmony) else {})
        # Answers do not show special tokens. In some families markers of calls and reasoning are such tokens.
        tags = () if self.reasoning is None else tuple(self.reasoning.tokens.values())
        calls = () if form.start_token is None else (form.start_token,)
        anchor = loaded.tokenizer.encode("a", special_tokens=False)
        decoders = {
            show: Decoder(partial(loaded.tokenizer.decode, show=show), anchor) for show in ((), tags, tags + calls)
        }
        self.decoder, self._tags_decoder, self._calls_decoder = decoders[()], decoders[tags], decoders[tags + calls]

    @cached_property
    def added_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after an input."""
        return added_tokens(self.loaded.tokenizer)

    def returned(
        self, engine: Engine, request: InferenceRequest, prepared: Prepared, resume: ResumeTokens
    ) -> list[AsyncGenerator[Tokens, None]]:
        """The events that bring the tokens of each prompt."""
        scorer, bytes_of = cast(Scorer, engine), self.loaded.tokenizer.bytes_of
        return [
            returned(request, place, prompt, scorer, self.decoder, bytes_of, resume)
            for place, prompt in enumerate(prepared.prompts)
        ]

    def choice(self, request: InferenceRequest, prepared: Prepared, index: int) -> Choice:
        """Choice `index` of `request`, at its beginning."""
        tools, seed, decoder = prepared.tools, f"{request.id}:{index}", self.decoder
        reasoning = self.reasoning if request.completion_type is CompletionType.CHAT else None
        parser: AnswerParser | None = None
        if tools is not None:
            # An answer that has a schema is a value of it or calls, and not first the one and then the other.
            calls_first = request.response_format is not None
            parser = ToolParser(self.tool_format, tools.names, seed, calls_first=calls_first)
            decoder = self._calls_decoder
        elif reasoning is not None:
            decoder = self._tags_decoder
        match reasoning:
            case Thinking():
                parser = ThinkingParser(reasoning, parser, opened=prepared.opened)
            case Harmony():
                parser = HarmonyParser(() if tools is None else tools.names, seed)
        prompt = prepared.prompts[index // request.n]
        return Choice(
            index,
            decoder,
            self.loaded.tokenizer.bytes_of,
            prepared.end_tokens,
            prompt.limit,
            stops=request.sampling.stop,
            min_tokens=request.sampling.min_tokens,
            parser=parser,
            echo="" if request.return_prompt else prompt.echo,
            context=prompt.context,
            tells_end=request.completion_type is CompletionType.COMPLETION,
        )


def _can_go_on(request: InferenceRequest, can: Capabilities, *, ranked: bool) -> bool:
    """Whether an engine that `can` so much goes on with the tokens of an earlier attempt at `request`."""
    sampling = request.sampling
    # Whoever gives a seed wants its draws.
    drawn = sampling.seed is not None and sampling.temperature > 0
    limited = ranked or drawn or bool(given(sampling, can.restarts))
    return can.resumes == "exact" or (can.resumes == "greedy" and not limited)


def _refuse_infinite(numbers: Iterable[float]) -> None:
    """Raises EngineFault for a number that JSON does not have."""
    if not math.isfinite(sum(numbers)):
        raise EngineFault("the model computed a number that is not finite")


def _length(request: InferenceRequest) -> int:
    """Characters or token ids of the prompts."""
    length = 0
    for prompt in request.prompts:
        length += len(prompt)
    for message in request.messages:
        length += len(message.get("content") or "")
    return length


def _sequence(request: InferenceRequest, prepared: Prepared, choice: Choice) -> TokenRequest:
    """What an engine is asked for, to go on with `choice`."""
    # Without a seed the request's id is one: a second attempt then goes on like the first.
    seed = request.id if request.sampling.seed is None else request.sampling.seed
    return TokenRequest(
        f"{request.id}/{choice.index}",
        prepared.prompts[choice.index // request.n].tokens,
        choice.limit - len(choice.tokens),
        request.sampling,
        f"{seed}:{choice.index}",
        prepared.grammar,
        tuple(choice.tokens),
        prepared.end_tokens,
        request.adapter or "",
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
    raise EngineFault(_BROKEN_OFF)
