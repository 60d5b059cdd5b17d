"""Prompts: chat templates and tokenization, with the errors that are the client's own."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import TemplateError

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.text.tool_formats import ToolFormat, with_tools_told

_RESERVED = frozenset(
    {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "chat_template", "tools"}
)


def encode_prompts(tokenizer: Tokenizer, request: InferenceRequest, form: ToolFormat) -> list[list[int]]:
    """The token ids of each prompt of `request` (a chat has one). Tools are told as `form` has it.

    Raises:
        InvalidRequest: the template refuses the messages, or a prompt is empty or holds an unknown token.
    """
    if request.completion_type is CompletionType.CHAT:
        return [_encode_chat(tokenizer, request, form)]
    return [_encode_prompt(tokenizer, prompt) for prompt in request.prompts]


def _encode_chat(tokenizer: Tokenizer, request: InferenceRequest, form: ToolFormat) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
    extra = {key: value for key, value in request.chat_template_kwargs.items() if key not in _RESERVED}
    options: dict[str, Any] = {"add_generation_prompt": True, **extra}
    tools = [] if request.tool_choice == "none" else [dict(tool) for tool in request.tools]
    messages = [_flattened(message) for message in request.messages]
    if not form.in_template:
        messages = with_tools_told(messages, tools)
    elif tools:
        options["tools"] = tools
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as exc:
        raise InvalidRequest(
            f"The model's chat template does not take these messages: {exc}", param="messages"
        ) from exc
    # The template writes the special tokens itself.
    ids = tokenizer.encode(text, special_tokens=False)
    if not ids:
        raise InvalidRequest("The messages make an empty prompt.", param="messages")
    return ids


def _encode_prompt(tokenizer: Tokenizer, prompt: str | tuple[int, ...]) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
        require_known(ids, tokenizer.vocabulary_size, "prompt")
    if ids:
        return ids
    if tokenizer.begin_token is None:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    return [tokenizer.begin_token]


def require_known(tokens: Iterable[int], vocabulary_size: int, param: str) -> None:
    """Refuse tokens that the model does not have; raises InvalidRequest."""
    for token in tokens:
        if not 0 <= token < vocabulary_size:
            raise InvalidRequest(f"Token {token} is not in the vocabulary of {vocabulary_size}.", param=param)


def _flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates take it: its text parts joined, its calls' arguments as objects."""
    flat = dict(message)
    content = flat.get("content")
    if content is None:
        flat["content"] = ""
    elif isinstance(content, list):
        flat["content"] = "".join(_part_text(part) for part in content)
    if flat.get("tool_calls"):
        flat["tool_calls"] = [_with_object_arguments(call) for call in flat["tool_calls"]]
    return flat


def _with_object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest("Only tool calls of type function are supported.", param="messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as exc:
            raise InvalidRequest("The arguments of a tool call are not JSON.", param="messages") from exc
    return {**call, "function": {**function, "arguments": arguments}}


def _part_text(part: Mapping[str, Any]) -> str:
    if part.get("type") == "refusal":
        return str(part.get("refusal") or "")
    if part.get("type") != "text":
        raise InvalidRequest(f"This model reads text only, not content of type {part.get('type')!r}.", param="messages")
    return str(part.get("text") or "")
