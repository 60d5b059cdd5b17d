"""How likely a prompt is, as Transformers computes it directly, on a tiny model with the whole text layer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers import loading, scoring
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.checkpoint import write_tiny_checkpoint
from support.engine import Answer, answer, answers, completion

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = "The capital of France is"
TEXTS = [f"{CONTEXT} Paris.", f"{CONTEXT} Rome.", "né 🙂 " * 60, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(folder: str) -> AsyncIterator[TextModel]:
    with pytest.MonkeyPatch.context() as patched:
        # float32, so that the comparison is exact; parts that are smaller than the prompts.
        patched.setattr(loading, "_dtype", lambda device: loading.torch.float32)
        settings = InferenceSettings(
            _env_file=None,
            default_model=folder,
            model_quantization="none",
            model_device="cpu",
            max_concurrent_requests=8,
            llm_batch_size=64,
        )
        model = TextModel(TransformersEngine(settings))
        await model.start(lambda line: None)
    yield model
    await model.close()


@pytest.fixture(scope="module")
def direct(folder: str) -> dict[str, list[tuple[float, int]]]:
    """For each of TEXTS, log probability and rank of each token but the first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            logprobs = torch.log_softmax(reference(ids).logits[0, :-1].float(), -1)
        own = logprobs.gather(1, ids[0, 1:, None])
        found[text] = list(zip(own[:, 0].tolist(), ((logprobs > own).sum(1) + 1).tolist(), strict=True))
    return found


def echo(*texts: str, **fields: object) -> object:
    return completion(*texts, **{"echo": True, "logprobs": 1, "prompt_logprobs": 1, "return_prompt": True, **fields})


def scored(found: Answer, expected: list[tuple[float, int]]) -> bool:
    first, *rest = found.logprobs[: len(expected) + 1]
    assert first.logprob is None
    assert [entry.logprob for entry in rest] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    return [entry.rank for entry in rest] == [rank for _, rank in expected]


@pytest.mark.parametrize("text", TEXTS)
async def test_a_prompt_is_as_likely_as_transformers_has_it(
    model: TextModel, direct: dict[str, list[tuple[float, int]]], text: str
) -> None:
    for _ in range(2):  # the second time, the prompt is in the cache
        found = await answer(model, echo(text, max_tokens=0))
        assert (found.text, found.finish_reason) == (text, "length")
        assert b"".join(entry.utf8 for entry in found.logprobs) == text.encode()
        assert scored(found, direct[text])
        assert all(len(entry.top) == 1 for entry in found.logprobs[1:])


async def test_many_are_scored_beside_a_stream(model: TextModel, direct: dict[str, list[tuple[float, int]]]) -> None:
    alone = await answer(model, completion("Once", max_tokens=40))
    stream, *found = await asyncio.gather(
        answer(model, completion("Once", max_tokens=40)),
        *(answers(model, echo(*TEXTS, max_tokens=1, n=2)) for _ in range(4)),
    )
    assert stream.tokens == alone.tokens
    for each in found:
        for index, one in each.items():
            text = TEXTS[index // 2]
            assert scored(one, direct[text])
            assert len(one.logprobs) == len(direct[text]) + 2


@pytest.mark.parametrize("kept", [1, 128, 300, 541, 543])
async def test_a_takeover_goes_on_within_the_prompt(model: TextModel, kept: int) -> None:
    request = echo(TEXTS[2], max_tokens=4)
    whole = await answer(model, request)
    assert len(whole.tokens) == 540 + 4
    rest = await answer(model, request, {0: whole.tokens[:kept]})
    assert whole.tokens[:kept] + rest.tokens == whole.tokens
    assert [entry.token for entry in rest.logprobs] == whole.tokens[kept:]
    assert whole.text.endswith(rest.text)


async def test_a_client_that_leaves_frees_the_engine(model: TextModel) -> None:
    events = model.generate(echo(TEXTS[2]), {})
    await anext(events)
    await anext(events)
    await events.aclose()
    assert model.status().sequences == 0
    await asyncio.wait_for(answer(model, echo("x", max_tokens=0)), 10)


async def test_room_is_given_in_turn() -> None:
    room, order = scoring.Room(4), []

    async def take(name: str, count: int) -> None:
        async with room.taken(count):
            order.append(name)
            await asyncio.sleep(0)

    with pytest.raises(EngineFault):
        async with room.taken(4):
            raise EngineFault("any")
    await asyncio.gather(take("a", 3), take("b", 4), take("c", 1))
    assert order == ["a", "b", "c"]
