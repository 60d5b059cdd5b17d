"""Two hundred generated JSON schemas, each followed by random tokens under its grammar: every answer validates.

The model is left out on purpose: its scores are random numbers here, the worst writer a grammar can have.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import validate
from transformers import AutoTokenizer

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import EngineFault, TokenRequest
from forebay_inference.engine.text.grammars import Compiler, grammar_of
from forebay_inference.engine.transformers.guided import Grammar, Grammars
from forebay_inference.engine.transformers.penalties import Histories
from forebay_inference.engine.transformers.sampling import Row, TokenChooser, choose
from forebay_inference.models.store import ensure_model
from support.schemas import schema

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]
END = 2
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def parts(data_dir: Path) -> tuple[Any, Grammars]:
    tokenizer = AutoTokenizer.from_pretrained(ensure_model(MODEL, data_dir, lambda line: None))
    return tokenizer, Grammars(tokenizer, len(tokenizer), frozenset({END}))


def compiled(grammars: Grammars, wanted: dict[str, Any]) -> Grammar:
    compiler = Compiler(grammars.compile)
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted}}
    grammar = compiler.compiled(grammar_of(form, None, compiler.fault))
    assert isinstance(grammar, Grammar)
    return grammar


def written_at_random(tokenizer: Any, grammars: Grammars, wanted: dict[str, Any], seed: int) -> str:
    grammar = compiled(grammars, wanted)
    guide = grammar.guide()
    size = len(tokenizer)
    chooser = TokenChooser(TokenRequest("r", (), 1, Sampling(), str(seed)), guide)
    histories = Histories(size, torch.device("cpu"))
    tokens: list[int] = []
    scores = torch.zeros(1, size)
    # What ends something is made likely where it is allowed, or a random writer hardly finds it.
    closing = [tokenizer.convert_tokens_to_ids(mark) for mark in ('"', "}", "]", '"}', '"]')]
    for _ in range(400):
        scores.zero_()
        scores[0, END] = 20.0
        scores[0, closing] = 10.0
        token = int(choose([Row(0, chooser, len(tokens))], scores, histories))
        assert not chooser.outcomes
        if token == END:
            return str(tokenizer.decode(tokens))
        tokens.append(token)
        chooser.accept(token)
    raise AssertionError(f"no end of {wanted} within 400 tokens")


@pytest.mark.parametrize("block", range(10))
def test_every_answer_validates(parts: tuple[Any, Grammars], block: int) -> None:
    for number in range(block * 20, block * 20 + 20):
        wanted = schema(random.Random(number))
        text = written_at_random(*parts, wanted, number)
        validate(json.loads(text), wanted)


def test_a_fault_quotes_neither_schema_nor_answer(parts: tuple[Any, Grammars]) -> None:
    """It goes into logs and states, where no prompt and no answer is."""
    tokenizer, grammars = parts
    wanted = {"type": "object", "properties": {"xyzzy": {"enum": ["plugh"]}}, "required": ["xyzzy"]}
    grammar = compiled(grammars, wanted)
    with pytest.raises(EngineFault) as caught:
        grammar.guide().accept(tokenizer.encode('{"xyzzy": "plover'))
    assert not [word for word in ("xyzzy", "plugh", "plover", "object") if word in str(caught.value)]
