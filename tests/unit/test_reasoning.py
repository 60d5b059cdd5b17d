"""Reasoning is told apart from the answer, whatever its format, in every case that a real model makes."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.harmony import MARKERS, Harmony, HarmonyParser
from forebay_inference.engine.text.reasoning import TAGS, AnswerParser, Reasoning, Thinking, ThinkingParser, thinking_of
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.engine.transformers.guided import Grammars
from support.engine import Answer, answer, chat
from support.templates import TemplateTokenizer, model_that_says

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
THINKS = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OPENS = PLAIN + "{{ '<think>\n\n</think>' if thinking is defined and not thinking else '<think>\n' }}"
HARMONY = PLAIN + "{# <|channel|> #}{{ reasoning_effort }}"
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": [{"a": 1}]}}}


def read(parser: AnswerParser, pieces: list[str]) -> tuple[str, ...]:
    """The reasoning and the content."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    texts = [part for part in parts if isinstance(part, str)]
    return tuple("".join(one for one in texts if isinstance(one, Reasoning) is wanted) for wanted in (True, False))


def cut(text: str, places: set[int]) -> list[str]:
    bounds = [0, *sorted(place for place in places if 0 < place < len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


async def said(text: str, template: str, *special: str, end: str = "", **fields: object) -> Answer:
    model, _ = await model_that_says(text, template, special, end)
    return await answer(model, chat("hi", **{"max_tokens": None, **fields}))


@pytest.mark.parametrize(("start", "end"), TAGS.items())
@pytest.mark.parametrize("special", [False, True])
async def test_each_family_s_tags(start: str, end: str, special: bool) -> None:
    """As text of a model whose template knows them, and as tokens that answers hide."""
    template = PLAIN if special else PLAIN + "{#" + end + "#}"
    found = await said(f"{start}\nA b.\n{end}\n\nC d.", template, *((start, end) if special else ()))
    assert (found.reasoning, found.text, found.finish_reason) == ("A b.", "C d.", "stop")


CASES = [
    (False, "<think>\nA\n\nB\n</think>\n\nC\n", "A\n\nB", "C\n"),
    (False, " \n<think>A</think>B", "A", "B"),
    (True, "A\n</think>\n\n  B", "A", "  B"),
    (False, "<think>\n\n</think>\n\nB", "", "B"),
    (True, "\n\n</think>\n\nB", "", "B"),
    (False, "<think>\nA, cut", "A, cut", ""),
    (True, "A </thi", "A </thi", ""),
    (True, "A\n</think>\n\n", "A", ""),
    (False, "<thin", "", "<thin"),
    (False, "\n B", "", "\n B"),
    (False, "B <think>C</think>", "", "B <think>C</think>"),
    (False, "<think>A<think>B</think>C</think>", "A<think>B", "C</think>"),
    (False, "", "", ""),
]


@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), CASES)
@settings(max_examples=20)
@given(places=st.sets(st.integers(1, 40)))
def test_any_split_of_an_answer_gives_its_reasoning(
    opened: bool, text: str, reasoning: str, content: str, places: set[int]
) -> None:
    parser = ThinkingParser(Thinking("<think>", "</think>", {}), None, opened=opened)
    assert read(parser, cut(text, places)) == (reasoning, content)


async def test_a_template_may_open_the_reasoning() -> None:
    opened = await said("A.\n</think>\n\nB.", OPENS)
    assert (opened.reasoning, opened.text) == ("A.", "B.")
    for kwargs in ({"enable_thinking": False}, {"thinking": False}, {"reasoning_effort": "none"}):
        off = await said("B.", OPENS, chat_template_kwargs=kwargs)
        assert (off.reasoning, off.text, off.reasoning_tokens) == ("", "B.", 0)


async def test_an_answer_that_is_continued_may_be_within_reasoning() -> None:
    def messages(text: str) -> tuple[dict[str, str], ...]:
        return ({"role": "user", "content": "a </think> <think>"}, {"role": "assistant", "content": text})

    kwargs = {"continue_final_message": True, "add_generation_prompt": False}
    for text, reasoning, content in (
        ("<think>\nHm", ", A.", "B."),
        ("<think>Hm</think>\n\nB", "", ", A.</think>\n\nB."),
    ):
        found = await said(", A.</think>\n\nB.", THINKS, messages=messages(text), chat_template_kwargs=kwargs)
        assert (found.reasoning, found.text) == (reasoning, content)


async def test_a_model_that_does_not_think_may_write_the_tags() -> None:
    text = "<think>is a tag</think>"
    assert (await said(text, PLAIN)).text == text
    assert (await said(f"`{text}`", THINKS)).text == f"`{text}`"


@pytest.mark.parametrize("stop", ["STOP", "</think>", "<think>", "\n"])
async def test_stop_strings_are_looked_for_in_the_content_alone(stop: str) -> None:
    found = await said("<think>\nA STOP\n</think>\n\nB STOP C\n", THINKS, stop=(stop,))
    text = {"STOP": "B ", "\n": "B STOP C"}.get(stop, "B STOP C\n")
    assert (found.reasoning, found.text) == ("A STOP", text)


async def test_reasoning_that_is_cut_is_no_content() -> None:
    found = await said("<think>A long thought</think>B", THINKS, max_tokens=12)
    assert (found.reasoning, found.text, found.finish_reason) == ("A lon", "", "length")


async def test_a_call_after_the_reasoning() -> None:
    found = await said(f"<think>{CALL}</think>\n\nNow.\n{CALL}", THINKS, tools=(WEATHER,))
    assert (found.reasoning, found.text, found.finish_reason) == (CALL, "Now.", "tool_calls")
    assert "".join(one["function"]["arguments"] for one in found.tool_calls) == '{"city": "Oslo"}'


async def test_reasoning_tokens_are_counted_with_their_tags() -> None:
    found = await said("<think>abc</think>de", THINKS, "<think>", "</think>")
    assert (found.reasoning_tokens, len(found.tokens)) == (5, 7)
    assert (await said("de", THINKS)).reasoning_tokens == 0


def test_a_vocabulary_with_the_tags_tells_a_thinking_model() -> None:
    assert thinking_of(TemplateTokenizer(PLAIN)) is None
    found = thinking_of(TemplateTokenizer(PLAIN, ("[THINK]", "[/THINK]")))
    assert found == Thinking("[THINK]", "[/THINK]", {"[THINK]": 256, "[/THINK]": 257})


ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
TO_WEATHER = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Yes.<|return|>", "Hm.", "Yes.", 0),
        ("<|channel|>final<|message|>Yes.<|return|>", "", "Yes.", 0),
        (f"{ANALYSIS}<|start|>assistant{TO_WEATHER}", "Hm.", "", 1),
        (f" to=functions.get_weather{TO_WEATHER.replace(' to=functions.get_weather', '')}", "", "", 1),
        (TO_WEATHER.replace("get_weather", "unknown"), "", '{"city": "Oslo"}', 0),
        (f"{ANALYSIS}<|start|>assistant{ANALYSIS}", "Hm.\nHm.", "", 0),
        (f"<|channel|>commentary<|message|>First.<|end|><|start|>assistant{TO_WEATHER}", "", "First.", 1),
        ("<|channel|>analysis<|message|>Hm", "Hm", "", 0),
        ("<|channel|>analysis", "", "", 0),
        ("No header.", "", "No header.", 0),
    ],
)
async def test_harmony(text: str, reasoning: str, content: str, calls: int) -> None:
    found = await said(text, HARMONY, *MARKERS, end="<|return|>", tools=(WEATHER,))
    assert (found.reasoning, found.text) == (reasoning, content)
    assert len({one["index"] for one in found.tool_calls}) == calls
    assert found.finish_reason == ("tool_calls" if calls else "stop")
    arguments = "".join(one["function"]["arguments"] for one in found.tool_calls)
    assert arguments == ('{"city": "Oslo"}' if calls else "")


@given(places=st.sets(st.integers(1, 120)))
def test_any_split_of_a_harmony_answer_gives_its_parts(places: set[int]) -> None:
    text = f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Yes <| no"
    assert read(HarmonyParser((), "seed"), cut(text, places)) == ("Hm.", "Yes <| no")


async def test_a_harmony_call_that_is_cut_is_not_called_one() -> None:
    found = await said(TO_WEATHER, HARMONY, *MARKERS, tools=(WEATHER,), max_tokens=len(TO_WEATHER) // 2 + 10)
    assert (found.finish_reason, len(found.tool_calls) > 1) == ("length", True)
    stopped = await said(TO_WEATHER[:-12], HARMONY, *MARKERS, tools=(WEATHER,))
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(("effort", "told"), [("none", "low"), ("minimal", "low"), ("high", "high"), ("xhigh", "high")])
async def test_a_harmony_model_gets_an_effort_that_it_knows(effort: str, told: str) -> None:
    model, engine = await model_that_says("", HARMONY, MARKERS)
    await answer(model, chat("hi", chat_template_kwargs={"reasoning_effort": effort}))
    assert engine.asked is not None
    assert engine.tokenizer.decode(engine.asked.prompt).endswith(told)


async def grammar(template: str, special: tuple[str, ...], request: InferenceRequest) -> str:
    model, engine = await model_that_says("", template, special)
    await answer(model, request)
    assert engine.asked is not None
    assert engine.asked.grammar is not None
    return engine.asked.grammar


@pytest.fixture(scope="module")
def library() -> PreTrainedTokenizerFast:
    """Of single bytes, with tags as tokens that answers hide but which have no role, as gpt-oss has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_tokens([AddedToken(text, special=True) for text in MARKERS])
    plain.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def test_tokens_that_answers_hide_are_known(library: PreTrainedTokenizerFast) -> None:
    tokenizer = LibraryTokenizer(library)
    assert set(MARKERS) < tokenizer.special_tokens.keys()
    ids = tokenizer.encode("<|channel|>a<think>")
    assert tokenizer.decode(ids) == "a<think>"
    assert tokenizer.decode(ids, show=ids[:1]) == "<|channel|>a<think>"


def follows(library: PreTrainedTokenizerFast, grammar: str, text: str, *, whole: bool = True) -> bool:
    grammars = Grammars(library, len(library), frozenset({library.convert_tokens_to_ids("<end>")}))
    ids = library(text + "<end>" * whole, add_special_tokens=False).input_ids
    try:
        grammars.compile(grammar).guide().accept(ids)
    except EngineFault:
        return False
    return True


@pytest.mark.parametrize("own", [True, False], ids=["token", "text"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_begins_after_the_reasoning(library: PreTrainedTokenizerFast, own: bool, opened: bool) -> None:
    tags = ("<think>", "</think>") if own else ("[THINK]", "[/THINK]")
    found = thinking_of(LibraryTokenizer(library)) if own else Thinking(*tags, {})
    assert found is not None
    assert (found.start, found.end) == tags
    guided = found.before('start: "{" /[0-9]+/ "}"', opened=opened)
    thought = f'\nHm {{"a" [/THIN </thin\n{tags[1]}'
    begins = "" if opened else tags[0]
    assert follows(library, guided, f"{begins}{thought}\n\n{{12}}")
    assert follows(library, guided, f"{begins}{tags[1]}{{12}}")
    assert follows(library, guided, "{12}") is not opened
    assert not follows(library, guided, f"{begins}{thought}\n\nNo.", whole=False)
    assert not follows(library, guided, f"{begins}Hm.")


def test_a_grammar_without_a_start_rule_leaves_no_room_for_reasoning() -> None:
    thinking = Thinking("<think>", "</think>", {})
    gbnf = 'root ::= "start"'
    assert thinking.before(gbnf, opened=False) == gbnf
    with pytest.raises(InvalidRequest, match="no rule `start`"):
        thinking.before(gbnf, opened=True)


async def test_a_thinking_model_s_structured_answer_is_guided(library: PreTrainedTokenizerFast) -> None:
    request = chat("hi", response_format=FORM)
    closed = chat("hi", response_format=FORM, chat_template_kwargs={"enable_thinking": False})
    text = '<think>Hm.</think>\n\n{"a": 1}'.replace("think>", "thinking>")
    template = THINKS.replace("think>", "thinking>")
    for asked in (request, closed):
        assert follows(library, await grammar(template, (), asked), text)
    opened = await grammar(OPENS.replace("think>", "thinking>"), (), request)
    assert follows(library, opened, 'Hm.</thinking>{"a": 1}')
    assert not follows(library, opened, '{"a": 1}')


async def test_a_harmony_answer_is_guided(library: PreTrainedTokenizerFast) -> None:
    ids = {text: library.convert_tokens_to_ids(text) for text in MARKERS}
    harmony = Harmony(ids)
    guided = harmony.grammar('start: "{}"', {"f": 'start: "{1}"'})
    final, call = "<|channel|>final<|message|>", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    for text in (
        f"{final}{{}}",
        f"{ANALYSIS}<|start|>assistant{final}{{}}",
        f"{ANALYSIS}<|start|>assistant{call}{{1}}",
    ):
        assert follows(library, guided, text)
    for text in ("{}", f"{final}{{1}}", f"{call}{{}}", f"{final}x"):
        assert not follows(library, guided, text, whole=False)
    assert not follows(library, harmony.grammar(None, {"f": 'start: "{1}"'}), final, whole=False)
    required = chat("hi", tools=(WEATHER,), tool_choice="required")
    assert "to=functions.get_weather" in json.dumps(await grammar(HARMONY, MARKERS, required))
    assert "final" not in await grammar(HARMONY, MARKERS, required)


def test_the_docs_name_the_tags() -> None:
    page = Path(__file__).parents[2] / "docs" / "engine.md"
    section = page.read_text().split("## Reasoning", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", section.replace("\\|", "|"), re.MULTILINE) == list(TAGS.items())
