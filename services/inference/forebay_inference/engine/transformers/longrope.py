"""Rotary embeddings with two sets of frequencies (longrope: Phi-3-128k, Phi-4-mini): short sequences use one, and
sequences of more than the original context use the other, from their first token on.

The library chooses by the longest sequence of a pass, for all of them. Here each sequence has its own, and one that
grows beyond the original context is computed again with the other, as the library's `generate` does.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from forebay_contracts.wire.errors import ConfigurationError

_pass: Final = threading.local()
"""Of each generation thread: `long`, which tokens of its pass belong to long sequences, shape [1, tokens, 1], or None
without any. Other threads have none and get what the library computes."""


def install(model: Any) -> int | None:
    """Have `model` choose by sequence, in passes that `watch` has prepared.

    Returns the original context in tokens, None where no layer has two sets.

    Raises:
        ConfigurationError: the model's own code chooses in a way that cannot be replaced.
    """
    found = [module for module in model.modules() if "longrope" in (getattr(module, "rope_type", None) or ())]
    for module in found:
        if module.rope_type != "longrope" or hasattr(module, "rope_init_fn"):
            # By layer type, or computed anew in each pass, as Phi-3.5 MoE does.
            raise ConfigurationError(f"longrope as {type(module).__name__} computes it depends on the whole batch")
        module.forward = _by_sequence(module, module.forward)
    return int(_original_context(found[0])) if found else None


def _original_context(rotary: Any) -> int:
    context: int = rotary.config.rope_parameters["original_max_position_embeddings"]
    return context


def _by_sequence(rotary: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    compute = inspect.unwrap(type(rotary).forward)  # without the library's choice
    short = rotary.original_inv_freq.clone()
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, short.device, seq_len=_original_context(rotary) + 1)

    def with_frequencies(frequencies: torch.Tensor, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        before, rotary.inv_freq = rotary.inv_freq, frequencies
        try:
            return compute(rotary, x, position_ids)
        finally:
            rotary.inv_freq = before  # the library writes into it

    def chosen(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if not hasattr(_pass, "long"):
            return forward(x, position_ids)
        of_short = with_frequencies(short, x, position_ids)
        if _pass.long is None:
            return of_short
        of_long = with_frequencies(long, x, position_ids)
        where = _pass.long.to(x.device)
        return tuple(torch.where(where, one, other) for one, other in zip(of_long, of_short, strict=True))

    return chosen


def watch(processor: Any, context: int) -> None:
    """Have the library's batch processor tell which sequences of a pass are longer than `context`, compute those again
    that have grown beyond it, and keep the cached beginnings of the two kinds apart."""
    scheduler, cache, inputs = processor.scheduler, processor.cache, processor.inputs_and_outputs
    prepare, kwargs_of_pass = processor.prepare_next_batch, inputs.get_model_kwargs
    long: set[str] = set()

    def prepared() -> Any:
        active = scheduler.active_requests
        long.intersection_update(active)
        for state in list(active.values()):
            if state.request_id not in long and _tokens(state) > context:
                _compute_again(scheduler, state)
        return prepare()

    def with_lengths(use_padding: bool = False) -> Any:
        requests = inputs.requests_in_batch
        flags = [_tokens(request.state) > context for request in requests]
        long.update(request.state.request_id for request, flag in zip(requests, flags, strict=True) if flag)
        _pass.long = None
        if any(flags):
            counts = torch.tensor([request.query_length for request in requests])
            _pass.long = torch.tensor(flags).repeat_interleave(counts).view(1, -1, 1)
        return kwargs_of_pass(use_padding=use_padding)

    processor.prepare_next_batch = prepared
    inputs.get_model_kwargs = with_lengths
    for allocator in cache.cache_allocators.values():
        _keep_apart(allocator, context, long)


def _tokens(state: Any) -> int:
    return len(state.initial_tokens) + len(state.generated_tokens)


def _compute_again(scheduler: Any, state: Any) -> None:
    # What the library does itself with a sequence for which the cache has no room.
    again = state.create_equivalent_initial_request()
    state._status = RequestStatus.FINISHED
    scheduler.finish_request(state.request_id)
    scheduler.add_waiting_request(again)


def _keep_apart(allocator: Any, context: int, long: set[str]) -> None:
    match, mark = allocator.match_prefix_blocks, allocator.mark_complete_blocks

    def matched(prompt: list[int]) -> Any:
        return match(_renamed(prompt) if len(prompt) > context else prompt)

    def marked(request_id: str, tokens: list[int], blocks: int) -> None:
        mark(request_id, _renamed(tokens) if request_id in long else tokens, blocks)

    allocator.match_prefix_blocks, allocator.mark_complete_blocks = matched, marked


def _renamed(tokens: Sequence[int]) -> list[int]:
    """Other numbers than any token has, so that the blocks of long sequences never equal those of short ones."""
    return [~token for token in tokens]
