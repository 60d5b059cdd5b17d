"""The bodies of `POST /v1/responses`, and of `input_tokens` and `compact` below it.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from collections.abc import Mapping as Members
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from forebay_api.openai.body import Bool, Finite, Int, Many, Metadata, Misfit, RequestBody, StrictModel
from forebay_api.openai.responses.compaction import ASK, MAX_SUMMARY_TOKENS
from forebay_api.openai.responses.history import chat_messages
from forebay_api.openai.responses.items import Id, InputItem, Item, ItemReference, MessageItem
from forebay_api.openai.responses.record import ResponseRecord, item_id
from forebay_api.openai.responses.text_format import Reasoning, TextConfig
from forebay_api.openai.responses.tools import (
    AllowedTools,
    CustomTool,
    FunctionTool,
    NamedChoice,
    Served,
    Tool,
    ToolChoice,
    as_function,
    by_function_name,
    function_name,
    shown,
)
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import RequestNotFound
from forebay_contracts.wire.request import RECOMMENDABLE, InferenceRequest, Sampling

MAX_TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"

TierOfResponse = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]


class ConversationReference(StrictModel):
    """A conversation by its id."""

    id: Id


class StreamOptions(StrictModel):
    """Accepted without effect."""

    include_obfuscation: Bool | None = None


class PromptBody(RequestBody):
    """What makes the prompt of a response."""

    input: str | Many[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    conversation: Id | ConversationReference | None = None
    tools: Many[Tool] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: Bool = True
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    truncation: Literal["auto", "disabled"] = "disabled"

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise Misfit("conversation", "previous_response_id and conversation exclude each other: send one of them")
        if not (self.input or self.previous_response_id or self.conversation):
            raise Misfit("input", "one of input, previous_response_id and conversation is needed")
        return self

    @model_validator(mode="after")
    def _chooses_among_its_tools(self) -> Self:
        tools, choice = by_function_name(shown(self.tools)), self.tool_choice
        names = [tool.name for tool in self.tools if isinstance(tool, FunctionTool | CustomTool)]
        if len(set(names)) < len(names):
            raise Misfit("tools", "two tools have one name")
        named: Sequence[Any] = ()
        if isinstance(choice, NamedChoice):
            named = (choice,)
        elif isinstance(choice, AllowedTools):
            named = [one for one in choice.tools if one.type in ("function", "custom")]
        for one in named:
            found = tools.get(function_name(one.name or "", one.namespace))
            if found is None or found.tool["type"] != one.type:
                raise Misfit("tool_choice", f"the {one.type} tool {one.name!r} is not among the tools")
        required = choice == "required" or (isinstance(choice, AllowedTools) and choice.mode == "required")
        if required and not self._callable():
            raise Misfit("tool_choice", "none of the tools that may be called is served here")
        return self

    @property
    def conversation_id(self) -> str | None:
        """The conversation that the response belongs to."""
        return self.conversation.id if isinstance(self.conversation, ConversationReference) else self.conversation

    @property
    def references(self) -> tuple[str, ...]:
        """The ids of the stored items that the input refers to."""
        if self.input is None or isinstance(self.input, str):
            return ()
        return tuple(item.id for item in self.input if isinstance(item, ItemReference))

    def items(self, request_id: str, stored: Members[str, dict[str, Any]] | None = None) -> tuple[dict[str, Any], ...]:
        """The input as items with ids. `stored` holds those that `references` names.

        Raises:
            RequestNotFound: `stored` lacks one.
        """
        given = (MessageItem(role="user", content=self.input),) if isinstance(self.input, str) else self.input or ()
        items = []
        for place, item in enumerate(given):
            if isinstance(item, ItemReference):
                if stored is None or item.id not in stored:
                    raise RequestNotFound(
                        f"Item with id '{item.id}' not found.", param=f"input[{place}].id", code="item_not_found"
                    )
                items.append(stored[item.id])
            elif isinstance(item, Item):
                known = item.id or item_id(item.prefix, names.response_id(request_id), place, of_input=True)
                items.append({"id": known, **item.members()})
        return tuple(items)

    def request(self, items: Sequence[Members[str, Any]] = (), **origin: Any) -> InferenceRequest:
        """The chat that goes into the queue; `items` is the whole conversation with the body's own input at its end.

        Raises:
            InvalidRequest: the items do not fit together.
        """
        choice, callable_ = self.tool_choice, self._callable()
        mode: str | dict[str, Any] | None
        if isinstance(choice, NamedChoice):
            mode = {"type": "function", "function": {"name": function_name(choice.name, choice.namespace)}}
        else:
            mode = choice.mode if isinstance(choice, AllowedTools) else str(choice)
        return InferenceRequest(
            **origin,
            messages=chat_messages(items, self.instructions),
            sampling=self.sampling(),
            tools=tuple(as_function(name, served) for name, served in callable_.items()),
            tool_choice=mode if callable_ else None,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.response_format(),
            chat_template_kwargs=self.reasoning.template_arguments(),
        )

    def sampling(self) -> Sampling:
        """How tokens are chosen: none, where a body only counts those of its prompt."""
        return Sampling(max_tokens=0)

    def _callable(self) -> dict[str, Served]:
        """The tools that may be called, by their names for the model."""
        tools, choice = by_function_name(shown(self.tools)), self.tool_choice
        if not isinstance(choice, AllowedTools):
            return tools
        allowed = {function_name(one.name, one.namespace) for one in choice.tools if one.name is not None}
        return {name: served for name, served in tools.items() if name in allowed}


class InputTokensBody(PromptBody):
    """Count the tokens of an input. It waits in the queue, since workers know tokens."""


class CompactBody(PromptBody):
    """Compact a conversation: the model writes a summary, which takes the place of what it has said and done."""

    service_tier: TierOfResponse | None = None
    # Accepted without effect.
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    def request(self, items: Sequence[Members[str, Any]] = (), **origin: Any) -> InferenceRequest:
        """The chat that goes into the queue: the conversation `items`, and the wish for its summary."""
        asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]}
        return InferenceRequest(
            **origin,
            messages=chat_messages((*items, asked), self.instructions),
            sampling=Sampling(max_tokens=MAX_SUMMARY_TOKENS, unset=RECOMMENDABLE),
            fit_max_tokens=True,
            chat_template_kwargs={"enable_thinking": False},
        )


class ResponseBody(PromptBody):
    """Answer a conversation with items."""

    stream: Bool = False
    stream_options: StreamOptions | None = None
    background: Bool = False
    store: Bool = True
    metadata: Metadata = Field(default_factory=dict)
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    service_tier: TierOfResponse | None = None
    include: Many[
        Literal[
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
            "reasoning.encrypted_content",
            "message.output_text.logprobs",
        ]
    ] = ()
    # Accepted without effect: they are about OpenAI's own service, or limit tools that only it runs.
    max_tool_calls: Annotated[Int, Field(ge=1)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    client_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Misfit("stream_options", "stream_options is only allowed when stream is true")
        if self.background and not self.store:
            raise Misfit("background", "background is only allowed when store is true")
        return self

    def sampling(self) -> Sampling:
        """The sampling parameters, with those marked that the client left open."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return Sampling(
            **given,
            max_tokens=self.max_output_tokens,
            logprobs=self.top_logprobs if LOGPROBS in self.include else None,
            unset=tuple(name for name in RECOMMENDABLE if name not in given),
        )

    def request(self, items: Sequence[Members[str, Any]] = (), **origin: Any) -> InferenceRequest:
        """The chat that goes into the queue, as `PromptBody.request` makes it."""
        return super().request(items, **origin, stream=self.stream)

    def record(self, items: tuple[dict[str, Any], ...], queued: InferenceRequest) -> ResponseRecord:
        """What is kept of the request; `items` is the body's own input, as `items` gives it."""
        return ResponseRecord(
            id=names.response_id(queued.id),
            key=queued.key,
            created_at=queued.created_at,
            deadline=queued.deadline,
            model=queued.named_model,
            input=items,
            previous_response_id=self.previous_response_id,
            conversation=self.conversation_id,
            background=self.background,
            store=self.store,
            stream=self.stream,
            logprobs=LOGPROBS in self.include,
            parameters=self.parameters() | {"service_tier": queued.service_tier},
            notify=queued.notify,
        )

    def parameters(self) -> dict[str, Any]:
        """The members of the response object that repeat the request.

        `truncation` says what is done: an input that does not fit the context is refused, whatever was asked.
        """
        choice = self.tool_choice
        names = (
            *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls"),
            *("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "temperature", "top_p"),
            *("presence_penalty", "frequency_penalty", "top_logprobs", "user"),
        )
        return {name: getattr(self, name) for name in names} | {
            "reasoning": {"effort": self.reasoning.effort, "summary": self.reasoning.summary},
            "text": self.text.shown(),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
            "tools": shown(self.tools),
            "truncation": "disabled",
        }
