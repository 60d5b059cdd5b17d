"""Every architecture that is served, as a tiny checkpoint: the batch against plain forward passes of the library."""

import asyncio
import gc
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import EngineFault, TokenRequest
from forebay_inference.engine.transformers import loading
from forebay_inference.engine.transformers.architectures import TESTED
from forebay_inference.engine.transformers.batch import Batch
from forebay_inference.engine.transformers.cache_shape import measure
from support.architectures import ORIGINAL_CONTEXT, VARIANTS, WINDOW, write_checkpoint

PASS_TOKENS, PAGE, ANSWER = 32, 32, 6
TOLERANCE = 1e-3
"""Nats; in float32 what is computed right differs by 1e-5."""
DOCS = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Loading collects garbage; over all that is imported that takes four fifths of the time of a test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In bf16, rounding would hide what is computed a little wrong."""
    monkeypatch.setattr(loading, "_dtype", lambda device: torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.setattr(loading, "use_cpus", lambda device: torch.set_num_threads(1))
    yield
    torch.set_num_threads(threads)


def prompts() -> list[list[int]]:
    """Within a pass; over several passes and beyond the window; and ending where longrope changes."""
    numbers = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    assert WINDOW < PASS_TOKENS < ORIGINAL_CONTEXT < len(numbers)
    return [numbers[7:12], numbers[20:] + numbers[:20], numbers[: ORIGINAL_CONTEXT - ANSWER // 2]]


async def served(model: Any) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompts, answers and their log probabilities: three together, then one whose beginning is in the cache."""
    size = model.config.get_text_config().vocab_size
    grammars, shape = SimpleNamespace(size=size), measure(model)
    batch = Batch(model, grammars, PASS_TOKENS, shape, 1, 24 * PAGE, asyncio.get_running_loop())
    batch.start()

    async def answer(prompt: Sequence[int]) -> tuple[list[int], list[int], list[float]]:
        sequence = batch.submit(TokenRequest("r", prompt, ANSWER, Sampling(temperature=0, logprobs=0)))
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = None
        while finish is None:
            step = await sequence.steps.get()
            if isinstance(step, EngineFault):
                raise step
            tokens += step.tokens
            logprobs += [one.logprob for one in step.logprobs]
            finish = step.finish
        return list(prompt), tokens, logprobs

    try:
        found = list(await asyncio.gather(*map(answer, prompts())))
        return [*found, await answer([*prompts()[1][: 2 * PAGE + 5], 1, 2, 3])]
    finally:
        batch.stop()


def plain_logprobs(model: Any, prompt: list[int], answer: list[int], *, by_length: bool) -> torch.Tensor:
    """[answer, vocabulary]: what the library gives without a cache; `by_length`: with one pass for each token."""

    def logits(tokens: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]

    with torch.inference_mode():
        if by_length:
            rows = torch.stack([logits(prompt + answer[:place])[-1] for place in range(len(answer))])
        else:
            rows = logits(prompt + answer)[len(prompt) - 1 : -1]
        return rows.log_softmax(-1).cpu()


async def compare(folder: Path, kind: str, fields: dict[str, Any], device: str = "cpu") -> None:
    write_checkpoint(folder, kind, **fields)
    loaded = loading.load(folder, "none", device, lambda line: None)
    answers = await served(loaded.model)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    by_length = "short_factor" in fields.get("rope_parameters", {})
    for prompt, tokens, logprobs in answers:
        expected = plain_logprobs(plain, prompt, tokens, by_length=by_length)
        assert expected.argmax(-1).tolist() == tokens
        torch.testing.assert_close(
            torch.tensor(logprobs), expected.max(-1).values, atol=TOLERANCE, rtol=0, msg=lambda told: f"{kind}: {told}"
        )


@pytest.mark.parametrize("kind", TESTED)
async def test_the_batch_answers_as_the_plain_model(tmp_path: Path, kind: str) -> None:
    await compare(tmp_path, kind, {})


@pytest.mark.parametrize("name", VARIANTS)
async def test_a_variant_is_answered_as_by_the_plain_model(tmp_path: Path, name: str) -> None:
    kind, fields = VARIANTS[name]
    assert kind in TESTED
    await compare(tmp_path, kind, fields)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "gemma4", "gpt_oss", "deepseek_v3", "falcon", "gpt_neox", "mistral"]
)
async def test_the_batch_on_cuda_answers_as_the_plain_model(tmp_path: Path, kind: str) -> None:
    await compare(tmp_path, kind, {}, "cuda:0")


def test_the_table_of_the_docs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCS.read_text().split("## Architectures\n")[1], re.MULTILINE)
    assert dict(rows) == TESTED
