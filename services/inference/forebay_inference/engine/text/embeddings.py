"""A model that answers with vectors: the inputs of a request as tokens, and an embedder's vectors as its answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Vector
from forebay_inference.engine.protocol import Embedder, EngineFault, EngineStatus, LoadedModel, Tokenizer
from forebay_inference.engine.text.templates import require_known


class EmbeddingModel:
    """Serves embeddings from `embedder`; see `Model`."""

    completion_types: tuple[CompletionType, ...] = (CompletionType.EMBEDDING,)

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._loaded: LoadedModel | None = None
        self._added: tuple[Sequence[int], Sequence[int]] = ((), ())
        # Tokenizing many long inputs takes a while; one thread keeps it off the event loop.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """See `Model.start`."""
        self._loaded = await self.embedder.start(progress)
        self._added = _added_tokens(self._loaded.tokenizer)
        return self._loaded

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[Event, None]:
        """See `Model.generate`."""
        loaded = self._loaded
        if loaded is None:
            raise EngineFault("the engine is not started, or closed")
        work = partial(_encoded, request, loaded, self._added)
        if loaded.encodes_quickly:
            inputs = work()
        else:
            inputs = await asyncio.get_running_loop().run_in_executor(self._preparing, work)
        yield Accepted(sum(map(len, inputs)))
        for index in resume:
            yield Finished(index, "stop")
        missing = {index: tokens for index, tokens in enumerate(inputs) if index not in resume}
        async with aclosing(self.embedder.embed(missing, request.dimensions)) as vectors:
            async for index, values in vectors:
                yield Vector(index, values)
                yield Finished(index, "stop")

    def fault(self) -> str | None:
        """See `Model.fault`."""
        return self.embedder.status().fault

    def load(self) -> EngineStatus:
        """See `Model.load`."""
        return self.embedder.status()

    async def close(self) -> None:
        """See `Model.close`."""
        self._loaded = None
        self._preparing.shutdown(wait=False, cancel_futures=True)
        await self.embedder.close()


def _encoded(
    request: InferenceRequest, loaded: LoadedModel, added: tuple[Sequence[int], Sequence[int]]
) -> list[list[int]]:
    """The token ids of every input; those in `added` stand before and after each.

    Raises:
        InvalidRequest: an input is too long, or has unknown tokens; or the vectors cannot have so few dimensions.
    """
    if loaded.dimensions is not None and request.dimensions not in (None, loaded.dimensions):
        raise InvalidRequest(
            f"This model's embeddings have {loaded.dimensions} dimensions, which cannot be changed.",
            param="dimensions",
        )
    before, after = added
    inputs: list[list[int]] = []
    for index, given in enumerate(request.prompts):
        if isinstance(given, str):
            tokens = loaded.tokenizer.encode(loaded.prefix + given)
        else:
            require_known(given, loaded.tokenizer.vocabulary_size, f"input[{index}]")
            tokens = [*before, *given, *after]
        if len(tokens) > loaded.context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {loaded.context_length} tokens. However, input {index} "
                f"resulted in {len(tokens)} tokens. Please reduce its length.",
                param="input",
                code="context_length_exceeded",
            )
        inputs.append(tokens)
    return inputs


def _added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after an input (`[CLS]` and `[SEP]` for instance)."""
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", special_tokens=False)
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
