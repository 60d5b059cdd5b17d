"""The OpenAI request bodies, validated, and how each becomes an `InferenceRequest`.

Sources: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create. A parameter is
honoured or refused by name; none is ignored in silence, but for those that only describe the request to OpenAI's
own service (`user`, `metadata`, `store`, ...), which are accepted.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forebay_contracts.wire.request import RECOMMENDABLE, CompletionType, InferenceRequest, Sampling

MAX_STOP_STRINGS = 4
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_LOGPROBS = 5
MAX_SEED = 2**63 - 1

# As OpenAI, and unlike Pydantic by itself: "2" and true are no numbers, 1 and "yes" no booleans.
Bool = Annotated[bool, Field(strict=True)]
Int = Annotated[int, Field(strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Misfit(ValueError):
    """Parameters that do not fit together; `param` is the one to change, relative to the object they are in."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class StrictModel(BaseModel):
    """An object in which an unknown parameter is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class RequestBody(StrictModel):
    """What all bodies have in common."""

    completion_type: ClassVar[CompletionType]

    model: Annotated[str, Field(min_length=1, max_length=512)]
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, body: Any) -> Any:
        """OpenAI's clients send null for what is not set."""
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body


class StreamOptions(StrictModel):
    """`include_usage`: one last chunk with the token counts."""

    include_usage: Bool = False
    include_obfuscation: Bool = False


class ContentPart(BaseModel):
    """A part of a message's content; only text is understood."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(BaseModel):
    """The function that the model called, its arguments as JSON text."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="allow", frozen=True)
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", frozen=True)
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | tuple[ContentPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise Misfit("content", f"a message of role {self.role!r} needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: content parts joined to one text."""
        message = self.model_dump(exclude_none=True, mode="json")
        if isinstance(self.content, tuple):
            message["content"] = "".join(part.text or part.refusal or "" for part in self.content)
        return message


class FunctionDefinition(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None


class Tool(BaseModel):
    """A tool that the model may use."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    """The name of one function."""

    name: str


class NamedToolChoice(StrictModel):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A named JSON schema that the answer must satisfy."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: Bool | None = None


class ResponseFormat(StrictModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Misfit("json_schema", "json_schema is needed with type json_schema, and only there")
        return self


_SAMPLING = frozenset(Sampling.model_fields) - {"max_tokens", "logprobs", "unset"}
"""What bodies and `Sampling` call by the same names, with the same defaults."""


class _CompletionBody(RequestBody):
    """What chat and completions have in common."""

    stream: Bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Int, Field(ge=0)] = 0
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[Finite, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[Int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    ignore_eos: Bool = False
    # Accepted: they tell OpenAI's service something that has no meaning here.
    metadata: dict[str, str] | None = None
    store: Bool | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Misfit("stream_options", "stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
        given = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING}
        return Sampling(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            unset=tuple(name for name in RECOMMENDABLE if name not in given),
        )


class ChatCompletionBody(_CompletionBody):
    """`POST /v1/chat/completions`."""

    completion_type = CompletionType.CHAT

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: Bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: Bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    modalities: tuple[Literal["text"], ...] | None = None
    reasoning_effort: Literal["none"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Misfit(
                "max_tokens", "max_tokens and max_completion_tokens are two names of one limit: send one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Misfit("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise Misfit("tool_choice", "tool_choice is only allowed when tools are given")
        if isinstance(self.tool_choice, NamedToolChoice):
            wanted = self.tool_choice.function.name
            if wanted not in {tool.function.name for tool in self.tools}:
                raise Misfit("tool_choice", f"the function {wanted!r} is not among the tools")
        return self

    def request(
        self, *, request_id: str, model: str, created_at: float, deadline: float, reply_to: str, key: str | None
    ) -> InferenceRequest:
        """The request as it goes into the queue; `model` is the name that the alias in the body stands for."""
        choice = self.tool_choice
        return InferenceRequest(
            id=request_id,
            completion_type=self.completion_type,
            model=model,
            created_at=created_at,
            deadline=deadline,
            reply_to=reply_to,
            key=key,
            stream=self.stream,
            messages=tuple(message.plain() for message in self.messages),
            n=self.n,
            sampling=self._sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            tools=tuple(tool.model_dump(mode="json", exclude_none=True) for tool in self.tools),
            tool_choice=choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=(
                self.response_format.model_dump(mode="json", by_alias=True, exclude_none=True)
                if self.response_format is not None and self.response_format.type != "text"
                else None
            ),
            chat_template_kwargs=self.chat_template_kwargs,
        )


Token = Annotated[Int, Field(ge=0)]
Prompt = (
    str
    | Annotated[tuple[Token, ...], Field(min_length=1)]
    | Annotated[tuple[str, ...], Field(min_length=1)]
    | Annotated[tuple[Annotated[tuple[Token, ...], Field(min_length=1)], ...], Field(min_length=1)]
)


def as_many(value: Prompt) -> tuple[str | tuple[int, ...], ...]:
    """One or many texts, or one or many lists of token ids, as many of either."""
    if isinstance(value, str) or isinstance(value[0], int):
        return (value,)
    return value


class CompletionBody(_CompletionBody):
    """`POST /v1/completions`."""

    completion_type = CompletionType.COMPLETION

    prompt: Prompt
    max_tokens: Annotated[Int, Field(ge=0)] = 16
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: Bool = False
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None:
            if self.best_of < self.n:
                raise Misfit("best_of", "best_of must be at least n")
            if self.stream and self.best_of > self.n:
                raise Misfit("best_of", "best_of larger than n cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise Misfit("max_tokens", "max_tokens=0 is only of use with echo")
        if len(self.prompts) * (self.best_of or self.n) > MAX_CHOICES:
            raise Misfit("prompt", f"at most {MAX_CHOICES} choices over all prompts")
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, one or many, as text or token ids."""
        return as_many(self.prompt)

    def request(
        self, *, request_id: str, model: str, created_at: float, deadline: float, reply_to: str, key: str | None
    ) -> InferenceRequest:
        """The request as it goes into the queue; `model` is the name that the alias in the body stands for."""
        return InferenceRequest(
            id=request_id,
            completion_type=self.completion_type,
            model=model,
            created_at=created_at,
            deadline=deadline,
            reply_to=reply_to,
            key=key,
            stream=self.stream,
            prompts=self.prompts,
            n=self.n,
            best_of=self.best_of if self.best_of != self.n else None,
            echo=self.echo,
            sampling=self._sampling(max_tokens=self.max_tokens, logprobs=self.logprobs),
        )
