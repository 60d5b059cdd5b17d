"""Conversations by the chat template of the default model, which knows neither tools nor reasoning."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.text.reasoning import thinking_of
from forebay_inference.engine.text.templates import Chat
from forebay_inference.engine.text.tool_formats import format_of
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.models.store import ensure_model
from support.engine import chat


@pytest.mark.model
def test_all_of_a_conversation_reaches_the_default_model(data_dir: Path) -> None:
    folder = ensure_model(InferenceSettings(_env_file=None).default_model, data_dir, lambda line: None)
    tokenizer = LibraryTokenizer(AutoTokenizer.from_pretrained(folder))
    assert thinking_of(tokenizer) is None
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = (
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "one", "tool_call_id": "call_1"},
    )
    assert Chat(tokenizer, format_of(tokenizer), {}).prompt(chat(messages=messages)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
