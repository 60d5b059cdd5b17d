"""The real engine: a Transformers model behind the engine seam."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.request import GENERATION, CompletionType, InferenceRequest, Sampling
from forebay_inference.engine.protocol import (
    Accepted,
    EngineEvent,
    EngineFault,
    EngineLoad,
    Finished,
    ModelInfo,
    ResumeTokens,
    Tokens,
)
from forebay_inference.engine.text.best_of import best, widened
from forebay_inference.engine.text.choice import Choice
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.transformers.batch import Batch, Step
from forebay_inference.engine.transformers.loading import give_back_memory, load
from forebay_inference.engine.transformers.memory import plan_cache
from forebay_inference.engine.transformers.serving import Serving
from forebay_inference.models.store import ensure_model, recommended_sampling


class TransformersEngine:
    """Serves one model from one continuous batch. Construct, `start`, `generate` often, `close`."""

    completion_types: tuple[CompletionType, ...] = GENERATION

    def __init__(
        self,
        *,
        model: str,
        served_name: str,
        data_dir: Path,
        quantization: str,
        device: str,
        slots: int,
        max_batch_tokens: int,
    ) -> None:
        self._model_source = model
        self._served_name = served_name
        self._data_dir = data_dir
        self._quantization = quantization
        self._device_name = device
        self._slots = slots
        self._max_batch_tokens = max_batch_tokens
        self._recommended: dict[str, float] = {}
        self._serving: Serving | None = None
        # Tokenizing a long prompt or building a grammar takes a while; one thread keeps it off the event loop.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @classmethod
    def from_settings(cls, settings: InferenceSettings) -> "TransformersEngine":
        """The engine that `settings` ask for; reads and loads nothing yet."""
        return cls(
            model=settings.default_model,
            served_name=settings.served_model,
            data_dir=settings.data_dir,
            quantization=settings.model_quantization,
            device=settings.model_device,
            slots=settings.slots,
            max_batch_tokens=settings.llm_batch_size,
        )

    async def start(self, progress: Callable[[str], None]) -> ModelInfo:
        """Fetch, convert, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model, the device or the quantization cannot be had.
        """
        loop = asyncio.get_running_loop()
        await in_daemon_thread(lambda: self._load(loop, progress))
        progress("warming up")
        request = InferenceRequest(
            id=f"warm-up-{uuid.uuid4()}",
            completion_type=CompletionType.COMPLETION,
            model=self._served_name,
            created_at=0,
            deadline=0,
            reply_to="",
            prompts=("The",),
            sampling=Sampling(max_tokens=4, temperature=0, ignore_eos=True),
        )
        async for _ in self.generate(request, {}):
            pass
        # bitsandbytes lays 4-bit weights out anew in the first pass.
        give_back_memory()
        if self._serving is None:
            raise EngineFault("the engine was closed while it started")
        loaded, context_length = self._serving.loaded, self._serving.context_length
        return ModelInfo(self._served_name, context_length, loaded.quantization, str(loaded.device))

    def _load(self, loop: asyncio.AbstractEventLoop, progress: Callable[[str], None]) -> None:
        folder = ensure_model(self._model_source, self._data_dir, progress)
        self._recommended = recommended_sampling(self._model_source, folder)
        loaded = load(folder, self._quantization, self._device_name, progress)
        config = loaded.model.config.get_text_config()
        cache = plan_cache(config, loaded.model.dtype, loaded.device, self._slots, loaded.context_length)
        progress(f"KV cache for {cache.tokens} tokens, context of {cache.context_length}")
        batch = Batch(loaded.model, self._max_batch_tokens, cache, loop)
        batch.start()
        self._serving = Serving(loaded, cache, batch)

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        """See `Engine.generate`."""
        request = request.model_copy(update={"sampling": request.sampling.settled(self._recommended)})
        if request.best_of is None or request.best_of <= request.n or request.stream:
            events = self._generate(request, resume)
        else:
            events = best(self._generate(widened(request), {}), request, resume)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        if self._serving is None:
            raise EngineFault("the engine is not started, or closed")
        serving, batch = self._serving, self._serving.batch
        if (reason := batch.fault()) is not None:
            raise EngineFault(f"the engine serves nothing: {reason}")
        prepared = await asyncio.get_running_loop().run_in_executor(self._preparing, serving.prepare, request)
        yield Accepted(prepared.prompt_tokens)

        steps: asyncio.Queue[tuple[Choice, Step]] = asyncio.Queue()
        choices: list[Choice] = []
        try:
            for index in range(len(prepared.prompts) * request.n):
                choice = serving.choice(request, prepared, index, resume.get(index, ()))
                choices.append(choice)
                if choice.finish_reason is None:
                    serving.submit(request, prepared, choice, steps)
                    continue
                if not choice.tokens and prepared.echoes[index // request.n]:
                    yield Tokens(index, (), prepared.echoes[index // request.n])
                yield Finished(index, choice.finish_reason)
            running = sum(choice.finish_reason is None for choice in choices)
            while running:
                choice, step = await steps.get()
                if choice.finish_reason is not None:
                    continue
                if step.fault is not None:
                    raise EngineFault(step.fault)
                event = choice.advance(step)
                if event is not None:
                    yield event
                if choice.finish_reason is not None:
                    running -= 1
                    serving.cancel(choice)
                    cached = 0 if choice.sequence is None else choice.sequence.cached_tokens
                    yield Finished(choice.index, choice.finish_reason, cached)
        finally:
            for choice in choices:
                serving.cancel(choice)

    def fault(self) -> str | None:
        """See `Engine.fault`."""
        return None if self._serving is None else self._serving.batch.fault()

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        serving = self._serving
        if serving is None:
            return EngineLoad(0, 0)
        return EngineLoad(serving.batch.sequences, serving.batch.steps, serving.batch.cache_usage())

    async def close(self) -> None:
        """See `Engine.close`."""
        serving, self._serving = self._serving, None
        self._preparing.shutdown(wait=False, cancel_futures=True)
        if serving is not None:
            await in_daemon_thread(serving.batch.stop)
