"""The bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`.

Sources: https://docs.anthropic.com/en/api/messages and messages-count-tokens.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from forebay_api.anthropic.messages.content import (
    AssistantMessage,
    Message,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of,
)
from forebay_api.openai.body import Bool, Finite, Int, Many, Misfit, OpenModel, RequestBody
from forebay_api.openai.generation import MAX_STOP_STRINGS
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import RECOMMENDABLE, InferenceRequest, Sampling


class Tool(OpenModel):
    """A tool that the client runs; `input_schema` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and tool.get("type") not in (None, "custom"):
            raise Misfit("type", f"tools of type {tool['type']!r} are not served here, only those of type 'custom'")
        return tool

    def function(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoice(OpenModel):
    """Whether the model calls tools, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Bool = False

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise Misfit("name", "a name is needed with type tool, and only there")
        return self

    def choice(self) -> str | dict[str, Any]:
        """The choice in OpenAI's form."""
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(OpenModel):
    """Whether the model thinks before it answers. A model that always thinks does so in any case."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: Literal["summarized", "omitted", "updates"] | None = None


class JsonFormat(OpenModel):
    """A JSON schema that the answer must satisfy."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(OpenModel):
    """What the answer must look like, and how much the model thinks, if its template knows grades of it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class ConversationBody(RequestBody):
    """What both endpoints have in common: a conversation, and the tools of its model."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    system: str | Many[TextBlock] = ""
    tools: Many[Tool] = ()
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Accepted without effect: they are about Anthropic's own service, or save tokens and change no answer.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    @model_validator(mode="after")
    def _results_have_calls(self) -> Self:
        called: set[str] = set()
        for place, message in enumerate(self.messages):
            for at, block in enumerate(() if isinstance(message.content, str) else message.content):
                if isinstance(block, ToolUseBlock):
                    called.add(block.id)
                elif isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                    where = f"messages[{place}].content[{at}].tool_use_id"
                    raise Misfit(where, f"no tool_use block before it has the id {block.tool_use_id[:256]!r}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        choice = self.tool_choice
        if len({tool.name for tool in self.tools}) < len(self.tools):
            raise Misfit("tools", "two tools have one name")
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise Misfit("tool_choice", "tool_choice is only allowed when tools are given")
        if choice is not None and choice.name is not None and choice.name not in {tool.name for tool in self.tools}:
            raise Misfit("tool_choice", f"the tool {choice.name!r} is not among the tools")
        return self

    @property
    def shows_thinking(self) -> bool:
        """Whether the client asked to see what the model thinks."""
        return self.thinking is not None and self.thinking.type != "disabled"

    @abstractmethod
    def sampling(self) -> Sampling:
        """How tokens are chosen."""

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue: a chat."""
        system = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        wanted = self.output_config.format if self.output_config is not None else None
        choice = self.tool_choice
        return InferenceRequest(
            **origin,
            messages=(*system, *(plain for message in self.messages for plain in message.plain())),
            sampling=self.sampling(),
            fit_max_tokens=True,
            tools=tuple(tool.function() for tool in self.tools),
            tool_choice=choice.choice() if choice is not None and self.tools else None,
            parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
            response_format=(
                {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.json_schema}}
                if wanted is not None
                else None
            ),
            chat_template_kwargs=self._template_arguments(),
        )

    def _template_arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {"enable_thinking": self.shows_thinking}
        if self.output_config is not None and self.output_config.effort is not None:
            given["reasoning_effort"] = self.output_config.effort
        last = self.messages[-1]
        if isinstance(last, AssistantMessage) and not last.calls:
            given |= {"add_generation_prompt": False, "continue_final_message": True}
        return given


class MessagesBody(ConversationBody):
    """Answer a conversation, in Anthropic's form."""

    max_tokens: Annotated[Int, Field(ge=1)]
    stream: Bool = False
    temperature: Annotated[Finite, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[Finite, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Int, Field(ge=0)] = 0
    stop_sequences: Annotated[Many[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)] = ()
    service_tier: Literal["auto", "standard_only"] | None = None
    # Accepted without effect.
    metadata: dict[str, Any] | None = None
    # Refused with the code on which the SDKs' tool runners send the whole conversation instead.
    thread: dict[str, Any] | None = None

    def sampling(self) -> Sampling:
        """The sampling parameters, with those marked that the client left open."""
        given = {name: getattr(self, name) for name in RECOMMENDABLE if name in self.model_fields_set}
        return Sampling(
            **given,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            unset=tuple(name for name in RECOMMENDABLE if name not in given),
        )

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue: a chat. Raises InvalidRequest if it is to go on from a thread."""
        if self.thread is not None:
            raise InvalidRequest(
                "threads are not kept here: send the whole conversation without thread",
                param="thread",
                code="thread_unsupported_request",
            )
        return super().request(**origin, stream=self.stream)


class CountTokensBody(ConversationBody):
    """Count the tokens of a conversation, in Anthropic's form. It waits in the queue, since workers know tokens."""

    def sampling(self) -> Sampling:
        """Nothing is generated."""
        return Sampling(max_tokens=0)
