"""The engine that serves a Transformers model from one continuous batch."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import (
    Capabilities,
    EngineFault,
    EngineStatus,
    LoadedModel,
    Step,
    TokenLogprob,
    TokenRequest,
)
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.engine.transformers.architectures import TESTED
from forebay_inference.engine.transformers.batch import Batch
from forebay_inference.engine.transformers.cache_shape import measure
from forebay_inference.engine.transformers.guided import Grammars
from forebay_inference.engine.transformers.loading import load
from forebay_inference.engine.transformers.scoring import SCORED_PART, Scored
from forebay_inference.engine.transformers.self_check import PlainModel, check_itself
from forebay_inference.models.store import ensure_model, recommended_sampling

_log = logging.getLogger(__name__)


class TransformersEngine:
    """Serves one model. Construct, `start`, `generate` often, `close`."""

    capabilities = Capabilities(resumes="exact", grammars="enforced", logprobs=True, prompt_logprobs=True)

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._batch: Batch | None = None
        self._plain: PlainModel | None = None
        self._tested = False

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Fetch, convert, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model, the device or the quantization cannot be had.
        """
        loop = asyncio.get_running_loop()
        loaded = await in_daemon_thread(lambda: self._load(loop, progress))
        progress("warming up")
        prompt = loaded.tokenizer.encode("The")
        warm_up = TokenRequest("warm-up", prompt, max_new_tokens=4, sampling=Sampling(temperature=0))
        try:
            async for _ in self.generate(warm_up):
                pass
            if self._plain is not None:
                await self._check(self._plain, loaded.context_length, progress)
        except EngineFault as exc:
            raise ConfigurationError(f"{self._settings.default_model} cannot be served: {exc}") from exc
        return loaded

    async def _check(self, plain: PlainModel, context_length: int, progress: Callable[[str], None]) -> None:
        """Compare with `plain`; raises EngineFault where an untested architecture differs."""
        try:
            await check_itself(self, plain, context_length, self._settings.llm_batch_size, progress)
        except EngineFault as exc:
            if not self._tested:
                raise
            # Tests compare the architecture on a CPU. So it may be the GPU's kernels, or their rounding.
            _log.warning("%s on %s: %s", self._settings.default_model, plain.device, exc)

    def _load(self, loop: asyncio.AbstractEventLoop, progress: Callable[[str], None]) -> LoadedModel:
        settings = self._settings
        folder = ensure_model(settings.default_model, settings.data_dir, progress, settings.hf_token)
        loaded = load(
            folder,
            settings.model_quantization,
            settings.model_device,
            progress,
            slots=settings.slots,
            allow_untested=settings.allow_untested_models,
        )
        config = loaded.model.config.get_text_config()
        self._tested = loaded.model.config.model_type in TESTED
        if not self._tested or loaded.device.type == "cuda":
            self._plain = PlainModel(loaded.model)
        shape = measure(loaded.model)
        grammars = Grammars(loaded.tokenizer, config.vocab_size, loaded.end_tokens)
        batch = Batch(
            loaded.model, grammars, settings.llm_batch_size, shape, settings.slots, loaded.context_length, loop
        )
        cache = batch.cache
        progress(f"KV cache for {cache.tokens} tokens, context of {cache.context_length}")
        batch.start()
        self._batch = batch
        return LoadedModel(
            LibraryTokenizer(loaded.tokenizer, min(len(loaded.tokenizer), config.vocab_size), grammars.vocabulary),
            cache.context_length,
            loaded.quantization,
            str(loaded.device),
            loaded.end_tokens,
            recommended_sampling(settings.default_model, folder),
            grammars.compile,
        )

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`."""
        batch = self._started()
        sequence = batch.submit(request)
        try:
            finish = None
            while finish is None:
                step = await sequence.steps.get()
                if isinstance(step, Exception):
                    raise step
                finish = step.finish
                yield step
        finally:
            batch.cancel(sequence.id)

    async def score(
        self, id: str, prompt: Sequence[int], top: int, adapter: str = ""
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `Scorer.score`."""
        batch = self._started()
        for start in range(0, len(prompt) - 1, SCORED_PART):
            scored = Scored(start, prompt[start + 1 : start + 1 + SCORED_PART], top)
            known = TokenRequest(id, prompt[: start + len(scored.targets)], 1, Sampling(temperature=0))
            async with batch.scoring.taken(len(scored.targets)):
                sequence = batch.submit(known, scored)
                try:
                    if isinstance(step := await sequence.steps.get(), Exception):
                        raise step
                finally:
                    batch.cancel(sequence.id)
            yield scored.all()

    def _started(self) -> Batch:
        if self._batch is None:
            raise EngineFault("the engine is not started, or closed")
        return self._batch

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return EngineStatus(None, 0, 0) if self._batch is None else self._batch.status()

    async def close(self) -> None:
        """See `Engine.close`."""
        batch, self._batch = self._batch, None
        if batch is not None:
            await in_daemon_thread(batch.stop)
