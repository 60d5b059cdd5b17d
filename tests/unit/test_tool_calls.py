import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import HERMES, LLAMA, MISTRAL, ToolFormat

TOOLS = frozenset({"f", "get_weather"})

values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text(alphabet='ab"\\{}[]<>/:, é\n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text(max_size=5), values, max_size=3)),
    min_size=1,
    max_size=3,
)


def written(form: ToolFormat, wanted: list[tuple[str, dict[str, Any]]]) -> str:
    objects = [json.dumps({"name": name, form.arguments_key: arguments}) for name, arguments in wanted]
    if form.end:
        return "\n".join(f"{form.start}\n{one}\n{form.end}" for one in objects)
    if form.bracketed:
        return f"{form.start} [{', '.join(objects)}]"
    return form.start + "; ".join(objects)


def read(form: ToolFormat, pieces: list[str], **options: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(form, TOOLS, "seed", **options)
    content, found = "", {}
    for piece in pieces:
        for part in parser.push(piece):
            if isinstance(part, str):
                content += part
                continue
            if "id" in part:
                found[part["index"]] = [part["function"]["name"], ""]
            found[part["index"]][1] += part["function"]["arguments"]
    content += "".join(part for part in parser.flush() if isinstance(part, str))
    assert parser.calls == len(found)
    return content, [(name, arguments) for name, arguments in found.values()]


def cut(text: str, places: set[int]) -> list[str]:
    bounds = [0, *sorted(place for place in places if 0 < place < len(text)), len(text)]
    return [text[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA])
@given(wanted=calls, places=st.sets(st.integers(1, 300), max_size=40), before=st.sampled_from(["", "Let me see.\n"]))
def test_any_split_of_calls_gives_the_calls(
    form: ToolFormat, wanted: list[tuple[str, dict[str, Any]]], places: set[int], before: str
) -> None:
    content, found = read(form, cut(before + written(form, wanted), places))
    assert content == before.rstrip("\n")
    assert [(name, json.loads(arguments)) for name, arguments in found] == wanted


@given(
    text=st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<tool", "{}", '{"a": 1}', "[", "\n", " ", "x"])),
    places=st.sets(st.integers(1, 60), max_size=20),
)
@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA])
def test_what_is_no_call_is_shown(form: ToolFormat, text: list[str], places: set[int]) -> None:
    whole = "".join(text).replace(HERMES.start, form.start)
    assert read(form, cut(whole, places)) == (whole, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LLAMA, '{"name": "Bob", "age": 5}'),
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, 'The marker is <tool_call>, and {"name": "f"} is no call.'),
        (HERMES, r'<tool_call>{"name": "\ud800", "arguments": {}}'),
        (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}'),
        (HERMES, '<tool_call>{"na'),
    ],
)
def test_text_that_calls_no_tool_is_content(form: ToolFormat, text: str) -> None:
    assert read(form, [text]) == (text, [])
    assert read(form, list(text)) == (text, [])


def test_prose_after_the_last_call_is_content() -> None:
    assert read(HERMES, list('<tool_call>\n{"name": "f", "arguments": {}}\nThere.')) == ("There.", [("f", "{}")])


def test_beside_a_call_a_marker_that_was_cut_is_no_content() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool'
    assert read(HERMES, list(text)) == ("", [("f", "{}")])


def test_a_structured_answer_may_hold_what_looks_like_a_call() -> None:
    answer = '{"text": "<tool_call>{\\"name\\": \\"f\\"}", "more": "<tool_call>\n{}"}'
    assert read(HERMES, list(answer), calls_first=True) == (answer, [])
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert read(HERMES, list(call), calls_first=True) == ("", [("f", '{"a": 1}')])


def test_calls_are_complete_once_each_is_whole() -> None:
    parser = ToolParser(HERMES, TOOLS, "seed")
    assert not parser.complete
    parser.push('<tool_call>\n{"name": "f", "arguments": {"a": {}')
    assert (parser.calls, parser.complete) == (1, False)
    parser.push("}}")
    assert parser.complete


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolParser(HERMES, TOOLS, "seed")
    deltas = parser.push('<tool_call>\n{"name": "f", "arguments": {"a": "b')
    assert [delta["function"]["arguments"] for delta in deltas if isinstance(delta, dict)] == ["", '{"a": "b']


def test_llama_calls_may_begin_with_their_brace() -> None:
    assert read(LLAMA, ['{"name": "f", "par', 'ameters": {"a": 1}}']) == ("", [("f", '{"a": 1}')])
    assert read(LLAMA, ['{"just": "an object"}']) == ('{"just": "an object"}', [])


def test_a_call_without_arguments_has_none() -> None:
    assert read(HERMES, ['<tool_call>{"name": "f"}']) == ("", [("f", "{}")])


def test_arguments_before_the_name_come_with_the_end() -> None:
    assert read(HERMES, list('<tool_call>{"arguments": {"a": "}"}, "name": "f"}')) == ("", [("f", '{"a": "}"}')])


def test_a_call_s_id_depends_on_its_place_alone() -> None:
    def identity(pieces: list[str]) -> str:
        parser = ToolParser(HERMES, TOOLS, "request:0")
        parts = [part for piece in pieces for part in parser.push(piece) if isinstance(part, dict)]
        return next(part["id"] for part in parts if "id" in part)

    text = written(HERMES, [("f", {})])
    assert identity([text]) == identity(list(text))
