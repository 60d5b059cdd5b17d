"""The body of `POST /v1/chat/completions`.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from forebay_api.openai.body import Bool, Int, Many, Misfit, OpenModel, StrictModel, bounded
from forebay_api.openai.generation import GenerationBody, unlimited
from forebay_contracts.wire.request import InferenceRequest

MAX_TOP_LOGPROBS = 20


class ContentPart(OpenModel):
    """A part of a message's content; only text is understood."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(OpenModel):
    """The function that the model called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(OpenModel):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(OpenModel):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Many[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        # An answer that was cut, or is audio, has none.
        if self.content is None and self.role not in ("assistant", "function"):
            raise Misfit("content", f"a message of role {self.role!r} needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: content parts, or a refusal, as one text."""
        # Of 200 messages, model_dump would take 0.3 ms longer.
        given = self.__dict__ | (self.model_extra or {})
        message = {name: value for name, value in given.items() if value is not None}
        if isinstance(self.content, tuple):
            message["content"] = "".join(part.text or part.refusal or "" for part in self.content)
        if refusal := message.pop("refusal", None):
            message["content"] = message.get("content") or refusal
        if calls := message.pop("tool_calls", None):
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in calls]
        if self.function_call is not None:
            message["function_call"] = self.function_call.model_dump(exclude_none=True)
        return message


class FunctionDefinition(OpenModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None


class Tool(OpenModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    """The name of one function."""

    name: str


class NamedToolChoice(StrictModel):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


_TEMPLATE = frozenset({"reasoning_effort", "add_generation_prompt", "continue_final_message"})

Limit = Annotated[Annotated[Int, Field(ge=1)] | None, BeforeValidator(unlimited)]


class ChatCompletionBody(GenerationBody):
    """Answer a conversation."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    logprobs: Bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Many[Tool] = ()
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: Bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool = False
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    modalities: Many[Literal["text"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    echo: Literal[False] = False
    add_special_tokens: Literal[False] = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Misfit(
                "max_tokens", "max_tokens and max_completion_tokens are two names of one limit: send one of them"
            )
        if self.continue_final_message and self.add_generation_prompt:
            what = "continue_final_message and add_generation_prompt exclude each other"
            raise Misfit("continue_final_message", what)
        if self.top_logprobs is not None and not self.logprobs:
            raise Misfit("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        if self.store and self.metadata is not None:
            try:
                bounded(self.metadata)
            except ValueError as exc:
                raise Misfit("metadata", str(exc)) from None
        if self.tool_choice not in (None, "none") and not self.tools:
            raise Misfit("tool_choice", "tool_choice is only allowed when tools are given")
        if isinstance(self.tool_choice, NamedToolChoice):
            wanted = self.tool_choice.function.name
            if wanted not in {tool.function.name for tool in self.tools}:
                raise Misfit("tool_choice", f"the function {wanted!r} is not among the tools")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's tokens."""
        return self.max_completion_tokens or self.max_tokens

    def _template_kwargs(self) -> dict[str, Any]:
        """The variables of the chat template."""
        if not self.model_fields_set & _TEMPLATE:
            return self.chat_template_kwargs
        given: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            given["reasoning_effort"] = self.reasoning_effort
        if self.add_generation_prompt is not None:
            given["add_generation_prompt"] = self.add_generation_prompt
        if self.continue_final_message:
            given |= {"add_generation_prompt": False, "continue_final_message": True}
        return given | self.chat_template_kwargs

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue."""
        choice = self.tool_choice
        return InferenceRequest(
            **origin,
            stream=self.stream,
            messages=tuple(message.plain() for message in self.messages),
            n=self.n,
            return_prompt=self.return_prompt,
            prompt_logprobs=self.prompt_logprobs,
            sampling=self.sampling(logprobs=(self.top_logprobs or 0) if self.logprobs else None),
            tools=tuple(tool.model_dump(mode="json", exclude_none=True) for tool in self.tools),
            tool_choice=choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.form(),
            chat_template_kwargs=self._template_kwargs(),
        )
