"""Which answers an engine goes on with, by what it declares."""

from typing import Any

import pytest

from forebay_contracts.wire.errors import InferenceFailed
from forebay_inference.engine.served.sglang import SGLang
from forebay_inference.engine.served.vllm import VLLM
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.engine.text.model import TextModel
from support.engine import answer, chat

BEGUN = {0: [0, 1]}
WITH_SCHEMA = {"response_format": {"type": "json_object"}}


async def resumed(capabilities: Any, fields: dict[str, Any]) -> list[int]:
    engine = SimulatedEngine()
    engine.capabilities = capabilities
    model = TextModel(engine)
    await model.start(lambda line: None)
    try:
        return (await answer(model, chat("[[tokens=4]]", **fields), BEGUN)).tokens
    finally:
        await model.close()


@pytest.mark.parametrize(
    ("capabilities", "fields"),
    [
        (VLLM.capabilities, {}),
        (VLLM.capabilities, {"seed": 1}),
        (VLLM.capabilities, {"temperature": 1.0, "repetition_penalty": 1.1}),
        (SGLang.capabilities, {"temperature": 1.0}),
        (SimulatedEngine.capabilities, {"temperature": 1.0, "seed": 1, "presence_penalty": 1.0, **WITH_SCHEMA}),
    ],
)
async def test_an_engine_goes_on_with_what_it_can(capabilities: Any, fields: dict[str, Any]) -> None:
    assert await resumed(capabilities, fields) == [2, 3]


@pytest.mark.parametrize(
    ("capabilities", "fields"),
    [
        (VLLM.capabilities, {"temperature": 1.0, "seed": 1}),
        (VLLM.capabilities, {"presence_penalty": 1.0}),
        (VLLM.capabilities, {"frequency_penalty": 0.1}),
        (VLLM.capabilities, WITH_SCHEMA),
        (SGLang.capabilities, {"repetition_penalty": 1.1}),
    ],
)
async def test_and_ends_the_rest_with_an_error_that_says_so(capabilities: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(InferenceFailed, match="cannot go on with the part of the answer"):
        await resumed(capabilities, fields)
