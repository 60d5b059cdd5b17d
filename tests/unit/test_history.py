"""Messages that clients send back: our own answers whatever became of them, and results in any order."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forebay_api.http.bodies import validated
from forebay_api.openai.chat.body import ChatCompletionBody
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.simulated import SimulatedEngine, SimulatedTokenizer
from forebay_inference.engine.text.history import with_calls_of_tools
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import HERMES, with_tools_told

USER = {"role": "user", "content": "Weather?"}
# Each member of the arguments, as Qwen3-Coder and GLM write them; the arguments as JSON, as most others do.
TEMPLATES = [
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v }};{% endfor %}{% endfor %}{{ m.role }}:{{ m.content + '' }}|{% endfor %}{# tools #}",
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ m.role }}:{{ m.content + '' }}|{% endfor %}{# tools #}",
]


def queued(*messages: dict[str, Any]) -> InferenceRequest:
    """The request that these messages make, on the worker's side of the queue."""
    body = validated(ChatCompletionBody, json.dumps({"model": "m", "messages": messages}).encode())
    request = body.request(
        id="i", completion_type=CompletionType.CHAT, model="m", created_at=0, deadline=0, reply_to="", key=None
    )
    return InferenceRequest.model_validate_json(request.encode())


class Templated(SimulatedTokenizer):
    """`shown` is the last prompt that the template has made."""

    def __init__(self, template: str) -> None:
        self._template = ImmutableSandboxedEnvironment().from_string(template)
        self.shown = ""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        self.shown = self._template.render(messages=messages, **options)
        return self.shown


def prompts(*messages: dict[str, Any]) -> list[str]:
    """What each of TEMPLATES makes of the messages."""
    found = []
    for template in TEMPLATES:
        engine, tokenizer = SimulatedEngine(), Templated(template)
        engine._tokenizer = tokenizer
        model = TextModel(engine)

        async def ask(model: TextModel = model) -> None:
            await model.start(lambda line: None)
            async for _ in model.generate(queued(*messages), {}):
                pass

        asyncio.run(ask())
        found.append(tokenizer.shown)
    return found


def call(arguments: Any, identity: str = "a", name: str = "f") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"city": "Oslo"}', {"city": "Oslo"}),
        ('{"city": "Os', {"city": "Os"}),
        ('{"city": "Oslo", "uni', {"city": "Oslo"}),
        ('{"city": {"names": ["Oslo", "Krist', {"city": {"names": ["Oslo", "Krist"]}}),
        ('{"city": "\\u00', {"city": ""}),
        ('{"city":', {}),
        ("{", {}),
        (" ", {}),
        ("", {}),
        ("null", {}),
        ("[1, 2]", {"arguments": [1, 2]}),
        ('"Oslo"', {"arguments": "Oslo"}),
        ("Oslo", {"arguments": "Oslo"}),
        ("{'city': 'Oslo'}", {"arguments": "{'city': 'Oslo'}"}),
        ('{"city": "\\ud800"}', {"arguments": '{"city": "\\ud800"}'}),
    ],
)
def test_whatever_arguments_a_call_had_reach_the_template_as_an_object(arguments: str, given: dict[str, Any]) -> None:
    request = queued(USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]})
    ((made,),) = [one["tool_calls"] for one in with_calls_of_tools(request.messages) if "tool_calls" in one]
    assert made["function"] == {"name": "f", "arguments": given}


def test_our_own_call_that_was_cut_anywhere_can_be_sent_back() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"city": "Troms\\u00f8 \\"ø\\"", "days": [1, -2.5e3, true, null]}}'
    for cut in range(len(text) + 1):
        parser = ToolParser(HERMES, {"f"}, "seed")
        parts = [part for part in parser.push(text[:cut]) if isinstance(part, dict)]
        arguments = "".join(part["function"]["arguments"] for part in parts)
        message = {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [call(arguments)] if parts else [],
        }
        assert all("assistant:" in prompt for prompt in prompts(USER, message, USER))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant"}, "assistant:|"),
        ({"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None}, "assistant:|"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "assistant:|"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "assistant:|"),
        ({"role": "assistant", "content": None, "audio": {"id": "audio_1"}}, "assistant:|"),
        ({"role": "assistant", "content": None, "refusal": "I will not."}, "assistant:I will not.|"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "assistant:No.|"),
        ({"role": "assistant", "content": "Yes.", "refusal": None, "annotations": []}, "assistant:Yes.|"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": "1'}}, "assistant:|"),
        ({"role": "function", "name": "f", "content": None}, "tool:|"),
        ({"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "4 °C"}]}, "tool:4 °C|"),
    ],
)
def test_a_message_may_have_any_part_that_an_answer_has(message: dict[str, Any], shown: str) -> None:
    for prompt in prompts(USER, message, USER):
        assert shown in prompt
        assert prompt.count("|") == 3


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
def test_only_an_answer_may_be_without_content(role: str) -> None:
    with pytest.raises(InvalidRequest, match="needs content") as refused:
        queued({"role": role, "content": None})
    assert refused.value.param == "messages[0].content"


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_results_come_in_the_order_of_their_calls(order: tuple[str, ...]) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [call("{}", identity) for identity in "abc"]}
    results = [{"role": "tool", "tool_call_id": identity, "content": f"of {identity}"} for identity in order]
    for prompt in prompts(USER, calls, *results, USER):
        assert "tool:of a|tool:of b|tool:of c|user:" in prompt
    second = [result | {"tool_call_id": result["tool_call_id"] * 2} for result in results]
    again = {**calls, "tool_calls": [call("{}", identity * 2) for identity in "abc"]}
    for prompt in prompts(USER, calls, *results, again, *second):
        assert prompt.count("tool:of a|tool:of b|tool:of c|") == 2


def test_a_result_of_no_call_stays_where_it_is() -> None:
    calls = {"role": "assistant", "tool_calls": [call("{}", "a"), call("{}", "b")]}
    results = [{"role": "tool", "tool_call_id": identity, "content": identity} for identity in "xba"]
    assert [one["content"] for one in with_calls_of_tools([USER, calls, *results])[2:]] == ["x", "a", "b"]
    assert with_calls_of_tools(results) == results


def test_a_function_call_and_its_result_are_those_of_a_tool() -> None:
    asked = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    made, result = with_calls_of_tools([asked, {"role": "function", "name": "f", "content": "2"}])
    (only,) = made["tool_calls"]
    assert only == call({"x": 1}, only["id"])
    assert "function_call" not in made
    assert result == {"role": "tool", "name": "f", "content": "2", "tool_call_id": only["id"]}


def test_tools_and_calls_are_told_in_their_own_letters() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "Погода в городе"}}
    made = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Осло"})]}
    told = json.dumps(with_tools_told([made], [tool]), ensure_ascii=False)
    assert "Погода в городе" in told
    assert "Осло" in told
