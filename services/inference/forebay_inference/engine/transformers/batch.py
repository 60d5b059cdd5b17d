"""The continuous batch: the library's manager and its thread, and the hand-off of tokens to asyncio."""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import (
    EngineFault,
    EngineStatus,
    Fault,
    Step,
    TokenLogprob,
    TokenRequest,
    as_fault,
)
from forebay_inference.engine.transformers import attention, gpu, longrope, masked_attention, waiting
from forebay_inference.engine.transformers.cache_shape import CacheShape
from forebay_inference.engine.transformers.guided import Grammars
from forebay_inference.engine.transformers.memory import plan_cache
from forebay_inference.engine.transformers.passes import Passes, survive_out_of_memory
from forebay_inference.engine.transformers.sampling import TokenChooser
from forebay_inference.engine.transformers.scoring import SCORED_TOKENS, Room, Scored, watch_passes

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class SequenceInBatch:
    """One sequence of tokens in the batch. Its `steps` end with one that has `finish`, or with the fault for which none
    comes; they are put on the event loop."""

    id: str
    end_tokens: frozenset[int]
    chooser: TokenChooser
    steps: asyncio.Queue[Step | Fault] = field(default_factory=asyncio.Queue, init=False)
    cached_tokens: int = field(default=0, init=False)
    delivered: int = field(default=0, init=False)


class Batch:
    """Runs sequences together on one model. `submit` and `cancel` are for the event loop's thread."""

    def __init__(
        self,
        model: Any,
        grammars: Grammars,
        max_batch_tokens: int,
        shape: CacheShape,
        slots: int,
        context_length: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.grammars = grammars
        self._sequences: dict[str, SequenceInBatch] = {}
        self._scored: dict[str, Scored] = {}
        self.scoring = Room(SCORED_TOKENS)
        self._second_team = waiting.SecondTeam()
        self._loop = loop
        self._shape = shape
        self._original_context = longrope.install(model)
        self._attends = attention.can_attend(model, shape)
        self._manager = ContinuousBatchingManager(
            model=model,
            # Without an end token, since every sequence brings its own; `Passes` chooses the tokens.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                allow_block_sharing=True,
                **gpu.batch_settings(
                    model,
                    shape,
                    max_batch_tokens,
                    context_length,
                    by_sequence=self._original_context is not None,
                ),
            ),
        )
        if self._attends:
            attention.install(model)
        elif masked_attention.can_attend(model):
            masked_attention.install(model)
        affordable = gpu.affordable_blocks(self._manager, shape) if model.device.type == "cuda" else None
        self.cache = plan_cache(shape, model.dtype, model.device, slots, context_length, affordable=affordable)
        self._manager.continuous_batching_config.num_blocks = self.cache.blocks
        survive_out_of_memory(self._manager)
        router = OutputRouter()
        # All outputs of a step at once, so that a step costs one wake-up of the event loop.
        router.deliver_batch = self.deliver
        router.deliver = lambda output: self.deliver([output])
        self._manager.output_router = router

    def start(self) -> None:
        """Allocate the cache and start the thread; the thread is a daemon where the caller's is.

        Raises:
            ConfigurationError: the memory that the cache was planned for is not there.
        """
        with torch.inference_mode():
            # The thread would do this itself, but a failure here is ours to report.
            try:
                with masked_attention.shaped(self._manager.model.config, self._shape):
                    processor = self._manager._create_batch_processor()
            except (MemoryError, torch.OutOfMemoryError) as exc:
                device, reason = self._manager.model.device, str(exc).partition("\n")[0]
                raise ConfigurationError(
                    f"no memory for a KV cache of {self.cache.tokens} tokens, which was free a moment ago: does "
                    f"another process use {device}? ({reason})"
                ) from exc
            self._manager.batch_processor = processor
            self._watch_prefixes(processor.cache)
            watch_passes(processor, self._scored)
            if self._manager.model.device.type == "cpu":
                waiting.watch(processor, self._second_team)
            Passes(processor, self._sequences, self.grammars.size)
            if self._attends:
                attention.watch_steps(processor)
            elif gpu.has_flash(self._manager.model):
                gpu.watch_flash(processor)
            else:
                masked_attention.fit_cache(processor, self._shape)
            if self._original_context is not None:
                longrope.watch(processor, self._original_context)
            # Records its CUDA graphs, where it uses them.
            processor.warmup(self._manager.model)
            self._manager.start()

    def submit(self, request: TokenRequest, scored: Scored | None = None) -> SequenceInBatch:
        """Put a sequence for `request` into the batch; it notes in `scored` how likely tokens of its prompt are.

        Raises:
            EngineFault: the batch takes no more, or the grammar does not allow the tokens so far.
        """
        guide = None if request.grammar is None else request.grammar.guide()
        chooser = TokenChooser(request, guide)
        # Not the request's id alone: an earlier attempt may still be leaving the batch.
        sequence = SequenceInBatch(f"{request.id}/{uuid.uuid4().hex[:8]}", request.end_tokens, chooser)
        self._sequences[sequence.id] = sequence
        if scored is not None:
            self._scored[sequence.id] = scored
        taken = self._manager.add_request(
            [*request.prompt, *request.generated],
            request_id=sequence.id,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            eos_token_id=list(request.end_tokens) or -1,
        )
        # The thread may have died between the library's check and its queue.
        if taken is None or self.fault() is not None:
            self._forget(sequence.id)
            raise EngineFault("the engine takes no more requests")
        return sequence

    def cancel(self, sequence_id: str) -> None:
        """Take a sequence out of the batch before its next step."""
        if self._forget(sequence_id):
            self._manager.cancel_request(sequence_id)

    def _forget(self, sequence_id: str) -> bool:
        self._scored.pop(sequence_id, None)
        return self._sequences.pop(sequence_id, None) is not None

    def fault(self) -> str | None:
        """Why the batch runs no more, or None while it does."""
        reason: str | None = self._manager.background_thread_status.can_accept_new_requests()
        if reason is None and not self._manager.is_running():
            reason = "the generation thread is gone"
        error = self._manager.background_thread_status.fatal_error
        return f"{type(error).__name__} in the generation thread" if error is not None else reason

    def status(self) -> EngineStatus:
        """How it is now; callable from any thread."""
        processor = self._manager.batch_processor
        used = None if processor is None else 1 - float(processor.cache.compute_free_capacity(relative=True))
        return EngineStatus(self.fault(), len(self._sequences), int(self._manager.current_batch), used)

    def stop(self) -> None:
        """Stop the thread, failing what still runs; blocks for a step at most."""
        self._manager.stop(block=True, timeout=_STOP_TIMEOUT_S, hard_stop=True)
        self._manager.destroy()
        self._second_team.hold(False)

    def deliver(self, outputs: Sequence[Any]) -> None:
        """Hand the outputs of one step to the event loop; called by the generation thread."""
        steps: list[tuple[SequenceInBatch, Step | Fault]] = []
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            tokens = tuple(output.generated_tokens[sequence.delivered :])
            sequence.delivered += len(tokens)
            ended = output.is_finished()
            # Known before the chooser is told of the token: its position is that of the first one after the known.
            outcome = sequence.chooser.outcome(len(sequence.chooser.tokens)) if tokens else None
            fault = outcome if isinstance(outcome, Exception) else self._accept(sequence, tokens, ended)
            if output.error is not None:
                # The library tells an error's text alone, which may be empty.
                fault = EngineFault(output.error or "the forward pass failed")
            if ended:
                self._forget(sequence.id)
            elif fault is not None:
                self.cancel(sequence.id)
            steps.append((sequence, _step(sequence, tokens, outcome, ended) if fault is None else fault))
        if not steps:
            return
        try:
            self._loop.call_soon_threadsafe(_dispatch, steps)
        except RuntimeError:
            _log.warning("the event loop is closed: dropping the tokens of %d sequences", len(steps))

    @staticmethod
    def _accept(sequence: SequenceInBatch, tokens: Sequence[int], ended: bool) -> Fault | None:
        if ended:
            return None
        try:
            for token in tokens:
                sequence.chooser.accept(token)
        except Exception as exc:  # one sequence's trouble must not end the thread that all share
            return as_fault(exc)
        return None

    def _watch_prefixes(self, cache: Any) -> None:
        """Note how much of each prompt was in the cache already: the library knows, but does not tell."""
        search = cache.search_prefix_match

        def search_and_note(request_id: str, prompt_ids: list[int]) -> int:
            if (scored := self._scored.get(request_id)) is not None:
                # What is in the cache is not computed, and has no scores.
                prompt_ids = prompt_ids[: scored.start]
            found: int = search(request_id, prompt_ids)
            sequence = self._sequences.get(request_id)
            if sequence is not None and not sequence.delivered:
                sequence.cached_tokens = found
            return found

        cache.search_prefix_match = search_and_note


def _step(
    sequence: SequenceInBatch, tokens: tuple[int, ...], outcome: Fault | TokenLogprob | None, ended: bool
) -> Step:
    logprobs = (outcome,) if isinstance(outcome, TokenLogprob) else ()
    finish: Literal["stop", "length"] | None = None
    if ended:
        finish = "stop" if tokens and tokens[-1] in sequence.end_tokens else "length"
    return Step(tokens, logprobs, finish, sequence.cached_tokens)


def _dispatch(steps: Sequence[tuple[SequenceInBatch, Step | Fault]]) -> None:
    for sequence, step in steps:
        sequence.steps.put_nowait(step)
