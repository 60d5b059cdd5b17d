"""Parameters on a tiny model of random weights. The log probabilities are those that Transformers computes directly."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers import loading, scoring
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.checkpoint import write_tiny_checkpoint
from support.engine import Answer, answer, answers, chat, completion

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


def echo(*texts: str, **fields: Any) -> InferenceRequest:
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


async def test_an_end_token_after_the_prompt_has_its_own_logprob(
    model: TextModel, direct: dict[str, list[tuple[float, int]]]
) -> None:
    """lm-eval leaves the last one out, as that of the one token that it asks for."""
    end = (await answer(model, completion(TEXTS[0], max_tokens=1))).tokens
    found = await answer(model, echo(TEXTS[0], max_tokens=1, stop_token_ids=tuple(end)))
    assert (found.text, found.finish_reason) == (TEXTS[0], "stop")
    assert [entry.token for entry in found.logprobs] == found.tokens
    assert scored(found, direct[TEXTS[0]])
    assert len(found.logprobs) == len(direct[TEXTS[0]]) + 2
    assert not (await answer(model, chat(logprobs=1, stop_token_ids=tuple(range(256))))).logprobs


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


async def agrees_at_every_token(model: TextModel, request: InferenceRequest) -> Answer:
    """The answer; a takeover after each of its tokens goes on to the same one."""
    whole = await answer(model, request)
    cuts = range(1, len(whole.tokens))
    rests = await asyncio.gather(*(answer(model, request, {0: whole.tokens[:cut]}) for cut in cuts))
    for cut, rest in zip(cuts, rests, strict=True):
        assert whole.tokens[:cut] + rest.tokens == whole.tokens
        assert whole.text.endswith(rest.text)
        assert rest.finish_reason == whole.finish_reason
    return whole


GBNF = """
root ::= answer ", " year
answer ::= "yes" | "no"
year ::= [0-9] [0-9]
"""
FORMS = [
    ({"type": "regex", "regex": r"a/\d{2}\\/"}, r"a/\d{2}\\/"),
    ({"type": "regex", "regex": "é{2}\n🙂"}, "éé\n🙂"),
    ({"type": "choice", "choice": ['né "q"\n', "日本"]}, 'né "q"\n|日本'),
    ({"type": "grammar", "grammar": GBNF}, "(yes|no), [0-9]{2}"),
    ({"type": "grammar", "grammar": 'start: WORD "!"\nWORD: /[a-c]{3}/'}, "[a-c]{3}!"),
]


@pytest.mark.parametrize(("form", "pattern"), FORMS)
async def test_an_answer_has_the_form_that_was_asked_for(model: TextModel, form: dict[str, Any], pattern: str) -> None:
    for request in (chat(response_format=form), completion("Once", response_format=form, temperature=1.0, seed=3)):
        found = await agrees_at_every_token(model, request)
        assert re.fullmatch(pattern, found.text)
        assert found.finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"type": "regex", "regex": "(("}, "unclosed group"),
        ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
        ({"type": "grammar", "grammar": "root ::= ("}, "Expected"),
        ({"type": "grammar", "grammar": "root ::= other"}, "other"),
        ({"type": "grammar", "grammar": "start: other"}, "other"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "number", "minimum": 2, "maximum": 1}}},
            "guided_x",
        ),
    ],
)
async def test_a_form_that_cannot_be_enforced_is_refused(model: TextModel, form: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        await answer(model, chat(response_format={**form, "param": "guided_x"}))
    assert refused.value.param == "guided_x"


async def test_a_form_beside_tools_is_refused(model: TextModel) -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    form = {"type": "regex", "regex": "a", "param": "guided_regex"}
    with pytest.raises(InvalidRequest, match="tools") as refused:
        await answer(model, chat(response_format=form, tools=tools))
    assert refused.value.param == "guided_regex"
    assert (await answer(model, chat(response_format=form, tools=tools, tool_choice="none"))).text == "a"


async def test_stop_tokens_and_the_least_number_of_tokens(model: TextModel) -> None:
    plain = await answer(model, completion("Once", max_tokens=12))
    stop = plain.tokens[3]
    first = plain.tokens.index(stop)
    cut = await agrees_at_every_token(model, completion("Once", max_tokens=12, stop_token_ids=(stop,)))
    assert (cut.tokens, cut.finish_reason) == (plain.tokens[: first + 1], "stop")
    assert plain.text.startswith(cut.text)
    for least in (first + 1, 12):
        longer = await agrees_at_every_token(
            model, completion("Once", max_tokens=12, stop_token_ids=(stop,), min_tokens=least)
        )
        assert len(longer.tokens) >= least
        assert stop not in longer.tokens[:least]
    with pytest.raises(InvalidRequest) as refused:
        await answer(model, chat(stop_token_ids=(10**6,)))
    assert refused.value.param == "stop_token_ids"


async def test_the_first_tokens_match_no_stop_string(model: TextModel) -> None:
    plain = await answer(model, completion("Once", max_tokens=12))
    count, stop = next((count, piece) for count, piece in enumerate(plain.pieces, 1) if piece)
    assert (await answer(model, completion("Once", max_tokens=12, stop=(stop,)))).tokens == plain.tokens[:count]
    later = await agrees_at_every_token(model, completion("Once", max_tokens=12, stop=(stop,), min_tokens=count))
    assert later.tokens[:count] == plain.tokens[:count]
    assert len(later.tokens) > count
    none = await answer(model, completion("Once", max_tokens=12, stop=(stop,), min_tokens=12))
    assert (none.text, none.finish_reason) == (plain.text, "length")


async def test_a_form_that_is_complete_ends_before_the_least_number_of_tokens(model: TextModel) -> None:
    found = await agrees_at_every_token(model, chat(response_format=FORMS[1][0], min_tokens=30))
    assert (found.text, found.finish_reason) == ("éé\n🙂", "stop")
    longer = await answer(model, chat(response_format={"type": "regex", "regex": "a+"}, min_tokens=5))
    assert len(longer.tokens) > 5


async def test_no_mass_for_top_p_is_the_likeliest_token(model: TextModel) -> None:
    greedy = await answer(model, completion("Once", max_tokens=8))
    assert (await answer(model, completion("Once", max_tokens=8, temperature=1.0, top_p=0.0))).tokens == greedy.tokens


async def test_a_message_that_is_continued_keeps_its_text(model: TextModel) -> None:
    kwargs = {"continue_final_message": True, "add_generation_prompt": False}
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The capital"})
    events = [event async for event in model.generate(chat(messages=messages, chat_template_kwargs=kwargs), {})]
    assert events[0].prompt_tokens == len("user: Hi\nassistant: The capital")
