"""Whatever a chat template lacks, it gets every message of a conversation in a form that it takes."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_inference.engine.text.probes import PROBES
from forebay_inference.engine.text.templates import Chat
from forebay_inference.engine.text.tool_formats import format_of
from support.engine import chat
from support.templates import TemplateTokenizer

ANY_ROLE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
DEVELOPER = ANY_ROLE.replace("m.role", "'DEV' if m.role == 'developer' else m.role")
STRICT = """{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
[{{ m.role }}]{{ m.content }}
{%- endfor %}"""
ONE_SYSTEM = """{% for m in messages %}
{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}
{% if m.role == 'developer' %}{{ raise_exception('unknown role') }}{% endif %}
[{{ m.role }}]{{ m.content }}
{%- endfor %}"""
DROPS_SYSTEM = "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
CALLS = """{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}
[{{ m.role }}{{ m.name if m.role == 'tool' }}]{{ m.content }}
{%- for call in m.tool_calls %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}
{%- endfor %}"""
SHORT_IDS = CALLS.replace(
    "[{{ m.role",
    "{% for call in m.tool_calls if call.id | length != 9 %}{{ raise_exception('ids have 9') }}{% endfor %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9') }}{% endif %}"
    "[{{ m.role",
)
ONE_CALL = CALLS.replace(
    "[{{ m.role", "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}[{{ m.role"
)
TEXT_ARGUMENTS = CALLS.replace("call.function.arguments | tojson", "'=' + call.function.arguments")
NO_TOOL_ROLE = CALLS.replace(
    "[{{ m.role", "{% if m.role == 'tool' %}{{ raise_exception('unknown role') }}{% endif %}[{{ m.role"
)
THINKING = CALLS.replace(
    "[{{ m.role",
    "{% if m.thinking and m.tool_calls and m.content %}{{ raise_exception('not both') }}{% endif %}"
    "<{{ m.thinking }}>[{{ m.role",
)

TEMPLATES = {
    "any role": (ANY_ROLE, "told_in_words developer_as_system"),
    "developer": (DEVELOPER, "told_in_words"),
    "strict": (STRICT, "told_in_words developer_as_system system_in_user merged_turns user_first"),
    "one system": (ONE_SYSTEM, "told_in_words developer_as_system system_first"),
    "drops system": (DROPS_SYSTEM, "told_in_words developer_as_system system_in_user"),
    "parts": (PARTS, "told_in_words developer_as_system content_as_parts"),
    "calls": (CALLS, "developer_as_system"),
    "short ids": (SHORT_IDS, "developer_as_system short_call_ids"),
    "one call": (ONE_CALL, "developer_as_system one_call_a_turn"),
    "text arguments": (TEXT_ARGUMENTS, "developer_as_system arguments_as_text"),
    "no tool role": (NO_TOOL_ROLE, "developer_as_system told_in_words"),
    "thinking": (THINKING, "developer_as_system reasoning_as_thinking text_before_calls"),
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@cache
def made(template: str) -> Chat:
    tokenizer = TemplateTokenizer(template)
    return Chat(tokenizer, format_of(tokenizer), {})


def prompt(template: str, *messages: dict[str, Any], **fields: Any) -> str:
    return made(template).prompt(chat(messages=messages, **fields))


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*numbers: int) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": '{"x": 1}'}
    return [{"id": f"call_{n}", "type": "function", "function": function} for n in numbers]


def result(number: int, text: str) -> dict[str, Any]:
    return turn("tool", text, tool_call_id=f"call_{number}")


@pytest.mark.parametrize(("template", "rewrites"), TEMPLATES.values(), ids=TEMPLATES)
def test_what_a_template_lacks_is_found(template: str, rewrites: str) -> None:
    assert [rewrite.__name__ for rewrite in made(template).rewrites] == rewrites.split()


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Of turns in any order, tool calls with their results among them. Each text is there once."""
    messages: list[dict[str, Any]] = []
    for kind in draw(st.lists(st.sampled_from(["developer", "system", "user", "assistant", "calls"]), max_size=8)):
        place = len(messages)
        if kind == "calls":
            two = [result(1, f"text{place + 1};"), result(2, f"text{place + 2};")]
            messages += [turn("assistant", f"text{place};", tool_calls=calls(1, 2)), *draw(st.permutations(two))]
        else:
            messages.append(turn(kind, f"text{place};"))
    return [*messages, turn("user", f"text{len(messages)};")]


@pytest.mark.parametrize("template", [one for one, _ in TEMPLATES.values()], ids=TEMPLATES)
@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["", "tools"])
@settings(max_examples=15)
@given(messages=conversations())
def test_every_message_reaches_the_prompt(template: str, tools: Any, messages: list[dict[str, Any]]) -> None:
    text = prompt(template, *messages, tools=tools)
    for message in messages:
        assert text.count(message["content"]) == 1


def test_the_system_message_goes_into_the_first_user_turn() -> None:
    told = [turn("developer", "Be brief."), turn("system", "Be kind."), turn("user", "Hi."), turn("user", "Well?")]
    assert prompt(STRICT, *told) == "[user]Be brief.\n\nBe kind.\n\nHi.\n\nWell?"
    assert prompt(ONE_SYSTEM, *told) == "[system]Be brief.\n\nBe kind.[user]Hi.[user]Well?"
    assert prompt(DEVELOPER, *told) == "[DEV]Be brief.[system]Be kind.[user]Hi.[user]Well?"
    assert prompt(ANY_ROLE, *told) == "[system]Be brief.[system]Be kind.[user]Hi.[user]Well?"
    later = [turn("user", "Hi."), turn("assistant", "Ho."), turn("system", "Be brief."), turn("user", "Go on.")]
    assert prompt(ONE_SYSTEM, *later) == "[user]Hi.[assistant]Ho.[user]Be brief.[user]Go on."
    assert prompt(STRICT, *later) == "[user]Hi.[assistant]Ho.[user]Be brief.\n\nGo on."
    assert prompt(STRICT, turn("assistant", "Ho."), turn("user", "Hi.")) == "[user][assistant]Ho.[user]Hi."


def test_a_template_with_strict_turns_can_use_tools_and_two_results() -> None:
    text = prompt(
        STRICT,
        turn("system", "Be brief."),
        turn("user", "Hi."),
        turn("assistant", "", tool_calls=calls(1, 2)),
        result(1, "one"),
        result(2, "two"),
        tools=(TOOL,),
    )
    head, told, rest = text.partition("[assistant]")
    assert head.startswith("[user]Be brief.\n\nYou may call functions.")
    assert head.endswith("\n\nHi.")
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    results = [f"<tool_response>\n{text}\n</tool_response>" for text in ("one", "two")]
    assert told + rest == f"[assistant]{call}\n{call}[user]{results[0]}\n\n{results[1]}"


def test_parallel_calls_become_turns_that_their_results_follow() -> None:
    text = prompt(
        ONE_CALL,
        turn("user", "Hi."),
        turn("assistant", "Wait.", tool_calls=calls(1, 2)),
        result(2, "two"),
        result(1, "one"),
    )
    one_call = '(f {"x": 1})'
    assert text.endswith(f"[assistant]Wait.{one_call}[toolf]one[assistant]{one_call}[toolf]two")


def test_earlier_reasoning_reaches_a_template_under_its_name() -> None:
    asked = [turn("user", "Hi."), turn("assistant", "", reasoning_content="Hm.", tool_calls=calls(1)), result(1, "1")]
    assert "<Hm.>[assistant](" in prompt(THINKING, *asked)
    assert "[assistant]Wait.<Hm.>[assistant](" in prompt(THINKING, asked[0], {**asked[1], "content": "Wait."}, asked[2])
    plain = "{% for m in messages %}<{{ m.reasoning_content }}>[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert "<Hm.>[assistant]Yes." in prompt(plain, asked[0], turn("assistant", "Yes.", reasoning="Hm."))
    assert prompt(ANY_ROLE, asked[0], turn("assistant", "Yes.", reasoning_content="Hm.")) == "[user]Hi.[assistant]Yes."


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_the_switch_of_reasoning_has_two_names(name: str) -> None:
    template = "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }}"

    def told(**given: Any) -> str:
        return prompt(template, turn("user", "a"), chat_template_kwargs=given)

    assert told(**{name: False}) == "False False "
    assert told(reasoning_effort="high") == "True True high"
    assert told(reasoning_effort="none") == "False False none"
    assert told(reasoning_effort="high", enable_thinking=False) == "False False high"
    assert told(enable_thinking=False, thinking=True) == "False True "
    assert told(reasoning_effort=["high"]) == "  ['high']"


def test_the_docs_say_what_is_done() -> None:
    page = Path(__file__).parents[2] / "docs" / "engine.md"
    section = page.read_text().split("## Conversations", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert [row.strip(" `") for row in rows[2:]] == [probe.lacks for probe in PROBES]
