"""A check at start, on a GPU and for a model that no test has compared: the batch against plain forward passes."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import Engine, EngineFault, TokenRequest, reason_of
from forebay_inference.engine.threads import in_daemon_thread

TOLERANCE: Final = 0.5
"""Nats by which a log probability may differ from that of the plain model; rounding in bf16 alone moves it by 0.2."""
_ANSWER: Final = 8
_SHORT: Final = 5


class PlainModel:
    """`model` as the library computes it: the attention that it was loaded with, whole sequences, nothing cached.

    Made before the model is put into the batch.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = model.device
        self._attention = model.config._attn_implementation
        text = model.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.window: int = getattr(text, "sliding_window", None) or 0

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[float, float]]:
        """Of each token of `answer`: its log probability, and that of the likeliest one. Nothing else may run."""
        served = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._attention)
        try:
            ids = torch.tensor([[*prompt, *answer]], device=self._model.device)
            count = len(answer) + 1
            with torch.inference_mode():
                scores = self._model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0, -count:-1]
            rows = scores.float().log_softmax(-1)
        finally:
            self._model.set_attn_implementation(served)
        return [(float(row[token]), float(row.max())) for row, token in zip(rows, answer, strict=True)]


async def check_itself(
    engine: Engine, plain: PlainModel, context_length: int, pass_tokens: int, progress: Callable[[str], None]
) -> None:
    """Compare prompts that are batched, computed in parts and longer than the sliding window, and one whose beginning
    is in the cache.

    Raises:
        EngineFault: they differ, or the engine fails.
    """
    progress("checking the model against plain forward passes")
    lengths = (_SHORT, pass_tokens + pass_tokens // 2, plain.window + pass_tokens // 2)
    longest = context_length - _ANSWER
    # Any tokens will do; a step of a large prime visits them all.
    prompts = [
        [(seed + place * 7919) % plain.vocabulary for place in range(min(length, longest))]
        for seed, length in enumerate(lengths)
    ]
    answers = await asyncio.gather(*(_answer(engine, prompt) for prompt in prompts))
    answers.append(await _answer(engine, prompts[-1]))
    worst = 0.0
    for prompt, (tokens, logprobs) in zip([*prompts, prompts[-1]], answers, strict=True):
        try:
            expected = await in_daemon_thread(partial(plain.logprobs, prompt, tokens))
        except Exception as exc:  # an untested model fails in a way of its own
            raise EngineFault(f"a plain forward pass failed: {reason_of(exc)}") from exc
        for found, (right, best) in zip(logprobs, expected, strict=True):
            worst = max(worst, abs(found - right), best - right)
    if not worst <= TOLERANCE:
        raise EngineFault(f"its answers differ from those of plain forward passes by {worst:.2f} nats")
    progress(f"checked: at most {worst:.3f} nats from plain forward passes")


async def _answer(engine: Engine, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    tokens: list[int] = []
    logprobs: list[float] = []
    request = TokenRequest("self-check", prompt, _ANSWER, Sampling(temperature=0, logprobs=0))
    async for step in engine.generate(request):
        tokens += step.tokens
        logprobs += [one.logprob for one in step.logprobs if one.logprob is not None]
    return tokens, logprobs
