"""The text layer on the simulated engine: whatever is text is the same above every engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from forebay_contracts.wire.errors import InferenceFailed, InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.events import Accepted, Finished, Tokens, Vector
from forebay_inference.engine.protocol import Capabilities, EngineFault
from forebay_inference.engine.text.model import TextModel
from support.engine import Answer, answer, answers, chat, completion, simulated_model

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tromsø", "unit": "}"}}\n</tool_call>'


@pytest_asyncio.fixture
async def model() -> AsyncIterator[TextModel]:
    model = simulated_model()
    yield model
    await model.close()


def says(text: str, **fields: Any) -> InferenceRequest:
    """A chat that is answered with `text`, a byte a token."""
    return chat(f"[[say]]{text}", **{"max_tokens": None, **fields})


def joined(parts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    calls: dict[int, list[str]] = {}
    for part in parts:
        if "id" in part:
            calls[part["index"]] = [part["function"]["name"], ""]
        calls[part["index"]][1] += part["function"]["arguments"]
    return [(name, arguments) for name, arguments in calls.values()]


async def test_orders_are_obeyed(model: TextModel) -> None:
    plain = await answer(model, chat("one two [[tokens=4]]"))
    assert (plain.text, plain.tokens, plain.finish_reason) == ("t0 t1 t2 t3", [0, 1, 2, 3], "stop")
    cut = await answer(model, chat("[[tokens=9]]", max_tokens=2))
    assert (cut.text, cut.finish_reason) == ("t0 t1", "length")
    none = await answer(model, chat("[[tokens=0]]"))
    assert (none.text, none.tokens, none.finish_reason) == ("", [], "stop")
    with pytest.raises(EngineFault, match="ordered to fail"):
        await answer(model, chat("[[tokens=2 fail]]"))
    with pytest.raises(InvalidRequest, match="does not know the order 'dance'"):
        await answer(model, chat("[[dance]]"))


@pytest.mark.parametrize(("text", "tokens"), [("one two  three\n", 3), ("", 1), (" ", 1), ("  a", 1)])
async def test_the_words_of_the_last_message_are_its_prompt_tokens(model: TextModel, text: str, tokens: int) -> None:
    events = [event async for event in model.generate(chat(text), {})]
    assert events[0] == Accepted(tokens)


async def test_characters_come_whole(model: TextModel) -> None:
    found = await answer(model, says("né 日本 🙂"))
    assert (found.text, len(found.tokens)) == ("né 日本 🙂", len("né 日本 🙂".encode()))
    assert not any("\ufffd" in piece for piece in found.pieces)
    cut = await answer(model, says("né 🙂", max_tokens=6))
    assert (cut.text, cut.finish_reason) == ("né \ufffd", "length")


async def test_a_stop_string_over_tokens_is_not_shown(model: TextModel) -> None:
    found = await answer(model, says("The END of it", stop=("END", "it")))
    assert (found.text, found.finish_reason, len(found.tokens)) == ("The ", "stop", 7)
    missed = await answer(model, says("The EN of it", stop=("END",)))
    assert (missed.text, missed.finish_reason) == ("The EN of it", "stop")
    last = await answer(model, says("The EN", stop=("END",), max_tokens=6))
    assert last.text == "The EN"


async def test_a_call_is_no_text(model: TextModel) -> None:
    found = await answer(model, says(f"Let me see.\n{CALL}", tools=(WEATHER,)))
    assert (found.text, found.finish_reason) == ("Let me see.", "tool_calls")
    ((name, arguments),) = joined(found.tool_calls)
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Tromsø", "unit": "}"})


@pytest.mark.parametrize("stop", ["}", "<tool_call>", "\n", "Oslo", "name"])
async def test_neither_a_call_nor_what_stands_around_it_matches_a_stop_string(model: TextModel, stop: str) -> None:
    found = await answer(model, says(CALL.replace("Tromsø", "Oslo"), tools=(WEATHER,), stop=(stop,)))
    assert (found.text, found.finish_reason) == ("", "tool_calls")
    assert json.loads(joined(found.tool_calls)[0][1]) == {"city": "Oslo", "unit": "}"}


@pytest.mark.parametrize("cut", [3, 14, 45, 60])
async def test_a_call_that_is_cut_is_not_called_one(model: TextModel, cut: int) -> None:
    ended = await answer(model, says(CALL[:cut], tools=(WEATHER,)))
    assert ended.finish_reason == "stop"
    limited = await answer(model, says(CALL, tools=(WEATHER,), max_tokens=cut))
    assert limited.finish_reason == "length"


async def test_without_tools_a_call_is_text(model: TextModel) -> None:
    for fields in ({}, {"tools": (WEATHER,), "tool_choice": "none"}):
        found = await answer(model, says(CALL, **fields))
        assert (found.text, found.tool_calls, found.finish_reason) == (CALL, [], "stop")


RESUMED = [
    says("né 🙂 né"),
    says("The E END of it", stop=("END",)),
    says("The EN", stop=("END",)),
    says(f"Wait.\n{CALL}\n{CALL}", tools=(WEATHER,), stop=("See",)),
    says("<tool_call> is the marker", tools=(WEATHER,)),
    says("\n<think>\nA </thi\n\n</think>\n\nB é <think>", stop=("C",)),
    says(f"<think>{CALL}</think>\n{CALL}", tools=(WEATHER,)),
    chat("[[tokens=7]]"),
    chat("[[random tokens=7]]", temperature=1.0),
    completion("[[tokens=5]]", echo=True),
]


@pytest.mark.parametrize("request_", RESUMED, ids=range(len(RESUMED)))
async def test_a_resume_at_any_token_goes_on_without_a_seam(model: TextModel, request_: InferenceRequest) -> None:
    """In the middle of a character, of a stop string, of a marker, of a call."""
    whole = await answer(model, request_)
    pieces = [event async for event in model.generate(request_, {}) if isinstance(event, Tokens)]
    for kept in range(1, len(whole.tokens) + 1):
        rest = await answer(model, request_, {0: whole.tokens[:kept]})
        assert whole.tokens[:kept] + rest.tokens == whole.tokens
        assert "".join(one.text for one in pieces[:kept]) + rest.text == whole.text
        assert "".join(one.reasoning for one in pieces[:kept]) + rest.reasoning == whole.reasoning
        assert [call for one in pieces[:kept] for call in one.tool_calls] + rest.tool_calls == whole.tool_calls
        assert (rest.finish_reason, rest.reasoning_tokens) == (whole.finish_reason, whole.reasoning_tokens)


async def test_the_choices_of_one_request_come_together(model: TextModel) -> None:
    found = await answers(model, completion("[[tokens=2]]", "[[tokens=3 delay_ms=1]]", n=2, echo=True))
    assert {index: one.text.partition("]]")[2] for index, one in found.items()} == {
        0: "t0 t1",
        1: "t0 t1",
        2: "t0 t1 t2",
        3: "t0 t1 t2",
    }
    resumed = await answers(model, completion("[[tokens=2]]", n=2), {1: [0, 1]})
    assert (resumed[0].text, resumed[1].text, resumed[1].finish_reason) == ("t0 t1", "", "stop")


async def test_one_choice_that_fails_ends_the_request(model: TextModel) -> None:
    with pytest.raises(EngineFault, match="ordered to fail"):
        await answers(model, completion("[[tokens=1000000 delay_ms=1]]", "[[tokens=1 fail]]", max_tokens=None))
    assert model.status().sequences == 0


async def test_echo_shows_the_prompt_once(model: TextModel) -> None:
    found = await answer(model, completion("Say  it. [[tokens=2]]", echo=True))
    assert found.text == "Say  it. [[tokens=2]]t0 t1"
    only = await answer(model, completion("The capital", echo=True, max_tokens=0))
    assert (only.text, only.tokens, only.finish_reason) == ("The capital", [], "length")
    ids = await answer(model, completion((1, 2), echo=True, max_tokens=1))
    assert ids.text == " t1 t2t0"


async def test_a_seed_is_the_choice_s_own(model: TextModel) -> None:
    ask = completion("[[random tokens=6]]", temperature=1.0, seed=3, n=3)
    found = await answers(model, ask)
    assert len({one.text for one in found.values()}) == 3
    again = await answers(model, ask.model_copy(update={"id": "another"}))
    assert [again[index].text for index in range(3)] == [found[index].text for index in range(3)]


async def test_best_of_shows_the_likeliest(model: TextModel) -> None:
    request = completion("[[random tokens=6]]", temperature=1.0, seed=4, logprobs=0)
    every = await answers(model, request.model_copy(update={"n": 4}))

    def score(one: Answer) -> float:
        return sum(entry.logprob for entry in one.logprobs)

    best = sorted(every.values(), key=score, reverse=True)
    found = await answers(model, request.model_copy(update={"n": 2, "best_of": 4}))
    assert [found[index].text for index in range(2)] == [one.text for one in best[:2]]
    rest = await answers(model, request.model_copy(update={"n": 2, "best_of": 4}), {1: best[1].tokens[:2]})
    assert rest[1].tokens == best[1].tokens[2:]


async def test_logprobs_carry_text_and_bytes(model: TextModel) -> None:
    found = await answer(model, says("né", logprobs=2))
    assert [(entry.text, entry.raw, len(entry.top)) for entry in found.logprobs] == [
        ("n", None, 2),
        ("\ufffd", (0xC3,), 2),
        ("\ufffd", (0xA9,), 2),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": (WEATHER,), "tool_choice": "required"},
        {"tools": (WEATHER,), "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ],
)
async def test_an_engine_that_ignores_grammars_answers_as_without_one(model: TextModel, fields: dict[str, Any]) -> None:
    found = await answer(model, chat("[[tokens=3]]", **fields))
    assert (found.text, found.finish_reason) == ("t0 t1 t2", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": (WEATHER,), "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"logit_bias": {49152 * 100: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {10**30: 1.0}}, "logit_bias"),
        ({"max_tokens": 1 << 20}, "messages"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(model: TextModel, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await answer(model, chat(**fields))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": (WEATHER,), "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_what_an_engine_does_not_declare_is_refused(
    model: TextModel, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr(model.engine, "capabilities", Capabilities("exact", grammars="no", logprobs=False))
    with pytest.raises(InvalidRequest) as refused:
        await answer(model, completion("a", **fields))
    assert refused.value.param == param


async def test_an_engine_that_cannot_resume_ends_the_request(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = completion("[[tokens=3]]", best_of=2)
    monkeypatch.setattr(model.engine, "capabilities", Capabilities("greedy", grammars="no", logprobs=True))
    assert (await answer(model, chat("[[tokens=3]]"), {0: [0]})).text == " t1 t2"
    with pytest.raises(InferenceFailed, match="cannot go on"):
        await answer(model, ranked, {0: [0]})
    without = Capabilities("greedy", grammars="ignored", logprobs=True, resumes_grammars=False)
    monkeypatch.setattr(model.engine, "capabilities", without)
    guided = chat("[[tokens=3]]", response_format={"type": "json_object"})
    assert (await answer(model, guided, {0: []})).text == "t0 t1 t2"
    with pytest.raises(InferenceFailed, match="cannot go on"):
        await answer(model, guided, {0: [0]})
    monkeypatch.setattr(model.engine, "capabilities", Capabilities("no", grammars="no", logprobs=True))
    assert (await answer(model, ranked, {0: []})).text == "t0 t1 t2"
    with pytest.raises(InferenceFailed, match="cannot go on"):
        await answer(model, chat("[[tokens=3]]"), {0: [0]})


async def test_closing_the_generator_frees_the_engine(model: TextModel) -> None:
    for request in (chat("[[tokens=1000]]", max_tokens=None), completion("[[tokens=1000]]", n=3, max_tokens=None)):
        events = model.generate(request, {})
        async for event in events:
            if isinstance(event, Tokens):
                break
        assert model.status().sequences > 0
        await events.aclose()
        assert model.status().sequences == 0


async def test_a_model_that_is_closed_serves_nothing(model: TextModel) -> None:
    running = asyncio.ensure_future(answer(model, chat("[[tokens=1000 delay_ms=1]]", max_tokens=None)))
    async with asyncio.timeout(30):
        while model.status().sequences == 0:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await model.close()
    with pytest.raises(EngineFault, match="closed"):
        await running
    with pytest.raises(EngineFault, match="not started, or closed"):
        await answer(model, chat("a"))


async def test_embeddings_are_a_function_of_their_input(model: TextModel) -> None:
    given = completion("one two", (1, 2), "one two", max_tokens=None)
    request = given.model_copy(update={"completion_type": CompletionType.EMBEDDING, "dimensions": 8})
    events = [event async for event in model.generate(request, {1: [0]})]
    assert events[:2] == [Accepted(6), Finished(1, "stop")]
    vectors = {event.index: event.values for event in events if isinstance(event, Vector)}
    assert sorted(vectors) == [0, 2]
    assert vectors[0] == vectors[2]
    assert len(vectors[0]) == 8 * 4
