"""Grammars of answers that have a schema or call tools, followed by a model of random weights, the worst of writers."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.grammars import Compiler, grammar_of
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.text.tool_formats import HERMES, LLAMA, MISTRAL, ToolFormat, tool_use
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.checkpoint import write_tiny_checkpoint
from support.engine import answer, chat

pytestmark = pytest.mark.asyncio(loop_scope="module")


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


PAINT = tool("paint", closed({"x": {"$ref": "#/$defs/T"}}, **{"$defs": {"T": {"enum": ["red"]}}}))
COUNT = tool("count", closed({"x": {"$ref": "#/$defs/T"}}, **{"$defs": {"T": {"enum": [1, 2]}}}))
SAME = tool("same", closed({"a": {"enum": [7]}, "b": {"$ref": "#/properties/a"}}))
OLD = tool("old", closed({"x": {"$ref": "#/definitions/T"}}, definitions={"T": {"enum": [3]}}))
IDENTIFIED = [
    tool(name, closed({"x": {"$ref": "#/$defs/T"}}, **{"$id": "https://example.com/t", "$defs": {"T": {"enum": [x]}}}))
    for name, x in (("first", 8), ("second", 9))
]
TREE = tool("tree", closed({"below": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TextModel]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    settings = InferenceSettings(
        _env_file=None, default_model=str(folder), model_quantization="none", model_device="cpu", llm_batch_size=64
    )
    model = TextModel(TransformersEngine(settings))
    await model.start(lambda line: None)
    yield model
    await model.close()


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("paint", '{"x": "red"}', '{"x": 1}'),
        ("count", '{"x": 1}', '{"x": "red"}'),
        ("same", '{"a": 7, "b": 7}', '{"a": 7, "b": 8}'),
        ("old", '{"x": 3}', '{"x": 4}'),
        ("first", '{"x": 8}', '{"x": 9}'),
        ("second", '{"x": 9}', '{"x": 8}'),
        ("tree", '{"below": {"below": null}}', '{"below": {"x": 3}}'),
    ],
)
async def test_each_tool_keeps_its_own_schema(
    model: TextModel, form: ToolFormat, name: str, right: str, wrong: str
) -> None:
    request = chat(
        tools=(PAINT, COUNT, SAME, OLD, *IDENTIFIED, TREE), tool_choice="required", parallel_tool_calls=False
    )
    engine = model.engine
    assert isinstance(engine, TransformersEngine)
    assert engine._batch is not None
    compiler = Compiler(engine._batch.grammars.compile)
    grammar = compiler.compiled(grammar_of(None, tool_use(request, form), compiler.fault))

    def written(arguments: str) -> list[int]:
        call = f'{{"name": "{name}", "{form.arguments_key}": {arguments}}}'
        if form.bracketed:
            call = f"{form.start}[{call}]"
        return model._serving.loaded.tokenizer.encode(f"{form.start}\n{call}\n{form.end}" if form.end else call)

    grammar.guide().accept(written(right))
    with pytest.raises(EngineFault, match="leave the grammar"):
        grammar.guide().accept(written(wrong))


@pytest.mark.parametrize("stop", [(), ("}", "<tool_call>", "x")])
async def test_a_tool_that_must_be_called_is_called_whole(model: TextModel, stop: tuple[str, ...]) -> None:
    for seed in range(4):
        request = chat(
            "Go.",
            tools=(PAINT, COUNT),
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.0,
            seed=seed,
            stop=stop,
            max_tokens=None,
        )
        found = await answer(model, request)
        assert (found.text, found.finish_reason) == ("", "tool_calls")
        call = "".join(part["function"]["arguments"] for part in found.tool_calls)
        assert json.loads(call)["x"] in {"paint": ["red"], "count": [1, 2]}[found.tool_calls[0]["function"]["name"]]


async def test_an_answer_keeps_to_its_schema_with_tools_beside_it(model: TextModel) -> None:
    schema = closed({"text": {"enum": ["<tool_call>", "plain"]}, "sum": {"enum": [5]}})
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for seed in range(4):
        given = {"response_format": form, "temperature": 1.0, "seed": seed, "max_tokens": None}
        found = await answer(model, chat("Go.", **given))
        assert json.loads(found.text)["text"] in ("<tool_call>", "plain")
        either = await answer(model, chat("Go.", tools=(PAINT,), **given))
        if either.finish_reason == "tool_calls":
            assert either.text == ""
        else:
            assert json.loads(either.text)["sum"] == 5


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
            "x",
        ),
        ({"tools": (tool("f", {"type": "nope"}),), "tool_choice": "required"}, "tools", "Invalid type: nope"),
        ({"tools": (tool("f", {"$ref": "#/no"}),), "tool_choice": "required"}, "tools", "'/no' does not exist"),
    ],
)
async def test_a_schema_that_cannot_be_enforced_is_refused_in_its_own_terms(
    model: TextModel, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        await answer(model, chat(**fields))
    assert refused.value.param == param
    assert "start:" not in refused.value.message


async def test_a_grammar_that_grows_too_large_ends_the_request_as_its_own_fault(model: TextModel) -> None:
    schema = {"type": "string", "pattern": "(.*a.{1000})"}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    request = chat("Go.", response_format=form, max_tokens=900)
    begun = model._serving.loaded.tokenizer.encode('"' + "ab" * 400)
    with pytest.raises(InvalidRequest, match="cannot be enforced up to the end of this answer"):
        await answer(model, request, {0: begun})
    assert model.status().sequences == 0
    assert (await answer(model, chat("Go."))).finish_reason is not None


async def test_a_large_schema_holds_up_neither_the_event_loop_nor_another_answer(model: TextModel) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {} for number in range(2_000)}}
    given = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    large = asyncio.create_task(answer(model, chat("Go.", **given)))
    others = 0
    while not large.done():
        began = time.perf_counter()
        await answer(model, chat("Go.", max_tokens=2))
        assert time.perf_counter() - began < 2
        others += 1
    assert others > 1
    assert (await large).tokens
