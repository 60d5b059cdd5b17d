"""Prompts: chat templates and tokenization, with the errors that are the client's own."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from jinja2 import TemplateError

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.text.history import with_calls_of_tools
from forebay_inference.engine.text.probes import rewrites_for
from forebay_inference.engine.text.rewrites import Message, rewritten
from forebay_inference.engine.text.tool_formats import ToolFormat, with_tools_told

_RESERVED = frozenset(
    {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "chat_template", "tools"}
)
_SWITCHES: Final = ("enable_thinking", "thinking")
_REFUSALS: Final = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_PROBE: Final = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "Text."}}},
    },
}


class Chat:
    """Makes prompts of conversations by a model's chat template. `rewrites` bring messages into the form it takes.

    `efforts` are other names of a `reasoning_effort` for this model.
    """

    def __init__(self, tokenizer: Tokenizer, form: ToolFormat, efforts: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._efforts = efforts
        self.rewrites = rewrites_for(self._probed, tools=form.in_template) if tokenizer.chat_template else ()

    def prompt(self, request: InferenceRequest) -> str:
        """The text of the prompt of `request`, special tokens included.

        Raises:
            InvalidRequest: the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        options = _options(request.chat_template_kwargs, self._efforts)
        tools = [] if request.tool_choice == "none" else [dict(tool) for tool in request.tools]
        messages = _flattened(request.messages)
        if not self._form.in_template:
            messages = with_tools_told(messages, tools)
        elif tools:
            options["tools"] = tools
        try:
            return self._tokenizer.apply_chat_template(rewritten(messages, self.rewrites), **options)
        except _REFUSALS as exc:
            raise InvalidRequest(
                f"The model's chat template does not take these messages: {exc}", param="messages"
            ) from exc

    def _probed(self, messages: list[Message], tools: bool) -> str | None:
        options = {"tools": [_PROBE]} if tools and self._form.in_template else {}
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        except Exception:  # a template is a program of others: whatever it raises here, the model may still be served
            return None


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The token ids of a chat's prompt; raises InvalidRequest if there are none."""
    # The template writes the special tokens itself.
    ids = tokenizer.encode(prompt, special_tokens=False)
    if not ids:
        raise InvalidRequest("The messages make an empty prompt.", param="messages")
    return ids


def encode_prompt(tokenizer: Tokenizer, prompt: str | tuple[int, ...]) -> list[int]:
    """The token ids of a completion's prompt; raises InvalidRequest if there are none or the model lacks one."""
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


def _options(given: Mapping[str, Any], efforts: Mapping[str, str]) -> dict[str, Any]:
    """The variables of the template. Families name the switch of reasoning differently."""
    if not given:
        return {"add_generation_prompt": True}
    options = {"add_generation_prompt": True, **{key: value for key, value in given.items() if key not in _RESERVED}}
    switches = [options[name] for name in _SWITCHES if name in options]
    if isinstance(effort := options.get("reasoning_effort"), str):
        switches.append(effort != "none")
        options["reasoning_effort"] = efforts.get(effort, effort)
    return {**dict.fromkeys(_SWITCHES, switches[0]), **options} if switches else options


def _flattened(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The messages as templates take them: text parts joined, the arguments of calls as objects, results with the name
    of their function."""
    flattened: list[Message] = []
    names: dict[Any, str] = {}
    for flat in with_calls_of_tools(messages):
        content = flat.get("content")
        if content is None:
            flat["content"] = ""
        elif isinstance(content, list):
            flat["content"] = "".join(_part_text(part) for part in content)
        if flat.get("tool_calls"):
            names |= {call.get("id"): call["function"].get("name", "") for call in flat["tool_calls"]}
        if flat.get("tool_call_id") in names:
            flat.setdefault("name", names[flat["tool_call_id"]])
        if (reasoning := flat.pop("reasoning", None)) is not None:
            flat.setdefault("reasoning_content", reasoning)
        flattened.append(flat)
    return flattened


def _part_text(part: Mapping[str, Any]) -> str:
    if part.get("type") == "refusal":
        return str(part.get("refusal") or "")
    if part.get("type") != "text":
        raise InvalidRequest(f"This model reads text only, not content of type {part.get('type')!r}.", param="messages")
    return str(part.get("text") or "")
