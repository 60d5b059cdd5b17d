import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import HERMES, LLAMA, MISTRAL, ToolFormat

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


def read(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(form, "seed")
    content, found = "", {}
    for piece in pieces:
        text, deltas = parser.push(piece)
        content += text
        for delta in deltas:
            if "id" in delta:
                found[delta["index"]] = [delta["function"]["name"], ""]
            found[delta["index"]][1] += delta["function"]["arguments"]
    content += parser.flush()
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


@given(text=st.text(alphabet="<tool_ca>{}[]TOL\n x", max_size=40), places=st.sets(st.integers(1, 40), max_size=20))
def test_what_is_no_call_is_shown(text: str, places: set[int]) -> None:
    text = text.replace(HERMES.start, "")
    content, found = read(HERMES, cut(text, places))
    assert (content, found) == (text, [])


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolParser(HERMES, "seed")
    _, deltas = parser.push('<tool_call>\n{"name": "f", "arguments": {"a": "b')
    assert [delta["function"]["arguments"] for delta in deltas] == ["", '{"a": "b']


def test_llama_calls_may_begin_with_their_brace() -> None:
    assert read(LLAMA, ['{"name": "f", "par', 'ameters": {"a": 1}}']) == ("", [("f", '{"a": 1}')])
    assert read(LLAMA, ['{"just": "an object"}']) == ('{"just": "an object"}', [])


def test_a_call_s_id_depends_on_its_place_alone() -> None:
    def identity(pieces: list[str]) -> str:
        parser = ToolParser(HERMES, "request:0")
        return next(delta["id"] for piece in pieces for delta in parser.push(piece)[1] if "id" in delta)

    text = written(HERMES, [("f", {})])
    assert identity([text]) == identity(list(text))
