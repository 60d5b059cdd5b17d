"""The real engine: a Transformers model behind the engine seam."""

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from forebay_contracts.errors import InvalidRequest
from forebay_contracts.messages import CompletionType, InferenceRequest, Sampling
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import (
    Accepted,
    EngineEvent,
    EngineFault,
    Finished,
    ModelInfo,
    ResumeTokens,
)
from forebay_inference.engine.transformers.batch import Batch, SequenceInBatch, Step
from forebay_inference.engine.transformers.chat import encode_prompts
from forebay_inference.engine.transformers.choice import Choice
from forebay_inference.engine.transformers.loading import Loaded, give_back_memory, load
from forebay_inference.engine.transformers.memory import CachePlan, plan_cache
from forebay_inference.engine.transformers.sampling import TokenChooser
from forebay_inference.model_store import ensure_model

_log = logging.getLogger(__name__)
T = TypeVar("T")


class TransformersEngine:
    """Serves one model from one continuous batch. Construct, `start`, `generate` often, `close`."""

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
        self._loaded: Loaded | None = None
        self._cache: CachePlan | None = None
        self._batch: Batch | None = None
        # Tokenizing a long prompt takes a while; one thread keeps it off the event loop.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

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
        await _in_daemon_thread(lambda: self._load(loop, progress))
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
        loaded, cache = self._parts()
        return ModelInfo(self._served_name, cache.context_length, loaded.quantization, str(loaded.device))

    def _load(self, loop: asyncio.AbstractEventLoop, progress: Callable[[str], None]) -> None:
        folder = ensure_model(self._model_source, self._data_dir, progress)
        loaded = load(folder, self._quantization, self._device_name, progress)
        config = loaded.model.config.get_text_config()
        cache = plan_cache(config, loaded.model.dtype, loaded.device, self._slots, loaded.context_length)
        progress(f"KV cache for {cache.tokens} tokens, context of {cache.context_length}")
        batch = Batch(loaded.model, self._max_batch_tokens, cache, loop)
        batch.start()
        self._loaded, self._cache, self._batch = loaded, cache, batch

    def _parts(self) -> tuple[Loaded, CachePlan]:
        if self._loaded is None or self._cache is None:
            raise EngineFault("the engine was not started")
        return self._loaded, self._cache

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        """See `Engine.generate`."""
        loaded, _ = self._parts()
        batch = self._batch
        if batch is None or (reason := batch.fault()) is not None:
            raise EngineFault(f"the engine serves nothing: {reason if batch is not None else 'it is closed'}")
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._tokenizing, encode_prompts, loaded.tokenizer, request, request.tools)
        limits = [self._new_tokens(request, prompt) for prompt in prompts]
        yield Accepted(sum(len(prompt) for prompt in prompts))

        steps: asyncio.Queue[tuple[Choice, Step]] = asyncio.Queue()
        choices: list[Choice] = []
        try:
            for index in range(len(prompts) * request.n):
                prompt, limit = prompts[index // request.n], limits[index // request.n]
                choice = self._choice(request, index, prompt, limit, tuple(resume.get(index, ())))
                choices.append(choice)
                if choice.finish_reason is not None:
                    yield Finished(index, choice.finish_reason)
                    continue
                choice.sequence = self._sequence(request, choice, prompt, steps)
                if not batch.submit(choice.sequence):
                    raise EngineFault("the engine takes no more requests")
            running = sum(choice.finish_reason is None for choice in choices)
            while running:
                choice, step = await steps.get()
                if choice.finish_reason is not None:
                    continue
                if step.fault is not None:
                    _log.error("request %s failed in the engine: %s", request.id, step.fault)
                    raise EngineFault("generation failed")
                event = choice.advance(step)
                if event is not None:
                    yield event
                if choice.finish_reason is not None:
                    running -= 1
                    cached = 0 if choice.sequence is None else choice.sequence.cached_tokens
                    self._cancel(choice)
                    yield Finished(choice.index, choice.finish_reason, cached)
        finally:
            for choice in choices:
                self._cancel(choice)

    def _cancel(self, choice: Choice) -> None:
        if choice.sequence is not None and self._batch is not None:
            self._batch.cancel(choice.sequence.id)

    def _new_tokens(self, request: InferenceRequest, prompt: Sequence[int]) -> int:
        """How many tokens may follow `prompt`; raises InvalidRequest where it or what was asked for cannot fit."""
        _, cache = self._parts()
        wanted = request.sampling.max_tokens
        context = cache.context_length
        param = "messages" if request.completion_type is CompletionType.CHAT else "prompt"
        start = f"This model's maximum context length is {context} tokens. However, "
        code = "context_length_exceeded"
        if len(prompt) + (1 if wanted is None else 0) > context:
            raise InvalidRequest(
                f"{start}your {param} resulted in {len(prompt)} tokens. Please reduce the length of the {param}.",
                param=param,
                code=code,
            )
        if wanted is None:
            return context - len(prompt)
        if len(prompt) + wanted > context:
            raise InvalidRequest(
                f"{start}you requested {len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the "
                f"completion). Please reduce the length of the {param} or completion.",
                param=param,
                code=code,
            )
        return wanted

    def _choice(
        self, request: InferenceRequest, index: int, prompt: Sequence[int], limit: int, resumed: Sequence[int]
    ) -> Choice:
        loaded, _ = self._parts()
        sampling = request.sampling
        end_tokens = frozenset() if sampling.ignore_eos else loaded.end_tokens
        choice = Choice(index, self._decode, sampling.stop, end_tokens, limit)
        choice.replay(resumed)
        return choice

    def _sequence(
        self,
        request: InferenceRequest,
        choice: Choice,
        prompt: Sequence[int],
        steps: "asyncio.Queue[tuple[Choice, Step]]",
    ) -> SequenceInBatch:
        loaded, _ = self._parts()
        # Without a seed the request's id is one: a second attempt then goes on like the first.
        seed = request.id if request.sampling.seed is None else str(request.sampling.seed)
        chooser = TokenChooser(
            request.sampling,
            f"{seed}:{choice.index}",
            prompt,
            choice.tokens,
            loaded.model.config.get_text_config().vocab_size,
            loaded.device,
        )
        return SequenceInBatch(
            # Not the request's id alone: an earlier attempt may still be leaving the batch.
            id=f"{request.id}/{choice.index}/{uuid.uuid4().hex[:8]}",
            tokens=[*prompt, *choice.tokens],
            max_new_tokens=choice.limit - len(choice.tokens),
            end_tokens=choice.end_tokens,
            chooser=chooser,
            on_step=lambda step: steps.put_nowait((choice, step)),
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        loaded, _ = self._parts()
        text: str = loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def fault(self) -> str | None:
        """See `Engine.fault`."""
        return None if self._batch is None else self._batch.fault()

    async def close(self) -> None:
        """See `Engine.close`."""
        batch, self._batch = self._batch, None
        if batch is not None:
            await _in_daemon_thread(batch.stop)
        self._loaded = None
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a daemon thread: neither loading nor the batch's thread, its child, may hold up an exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (work(), None)
        except Exception as exc:
            outcome = (None, exc)
        loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True, name="engine-work").start()
    result: T = await future
    return result
