"""One request as it is stored in the stream."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Literal

import orjson
from pydantic import Field

from forebay_contracts.wire import names
from forebay_contracts.wire.message import SCHEMA_VERSION, Message


class CompletionType(StrEnum):
    """What kind of answer a request wants. A worker that does not know a request's type cannot read the request."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"


GENERATION: Final = (CompletionType.CHAT, CompletionType.COMPLETION)
"""What a model that generates text serves."""

POOLING: Final = (CompletionType.EMBEDDING, CompletionType.RERANK)
"""What is answered with vectors, and not with tokens."""


class Tier(StrEnum):
    """How soon a request is served. One of the tier `flex` waits until there is nothing else to do, and gives way. So
    does one of `overflow`, which is what a key has beyond its bound."""

    DEFAULT = "default"
    FLEX = "flex"
    OVERFLOW = "overflow"


ADAPTER_SCHEMA: Final = 2
"""The schema of a request with an adapter. A worker of schema 1 would leave the adapter out, so it must not read it."""


RECOMMENDABLE: Final = ("temperature", "top_p", "top_k", "repetition_penalty")
"""The sampling parameters for which a model may recommend values."""


class Sampling(Message):
    """How tokens are chosen. Names and ranges are OpenAI's, with the usual extensions.

    `max_tokens` None means up to the model's context length. `stop` holds at most 16 strings. `logprobs` is how many
    alternatives to report for each token (0: only the chosen one, None: no log probabilities). `unset` names those of
    RECOMMENDABLE that the client did not give: the model's recommendation applies to them. Of the first `min_tokens`
    tokens none ends the answer.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    unset: tuple[str, ...] = ()

    def settled(self, recommended: Mapping[str, float]) -> "Sampling":
        """The same with the model's recommendations for what the client did not give."""
        return self.model_copy(update={name: recommended[name] for name in self.unset if name in recommended})


class InferenceRequest(Message):
    """One request as it waits in the stream.

    Times are seconds since the epoch. A chat has `messages`; a completion has `prompts`, each text or token ids. The
    answer has `len(prompts) * n` choices (`n` for chat), numbered from 0, the choices of one prompt together. For an
    embedding, `prompts` are the inputs, and the choices are their vectors, cut to `dimensions` if that is set. For a
    rerank, `prompts` are the query and the documents, and the choices are the scores of the documents. `key` is the
    name of the client's key, if the api has keys. With `return_prompt`, the deltas of each choice begin with the tokens
    of its prompt; `prompt_logprobs` is how many alternatives to report for each of these, as `logprobs` is. With
    `fit_max_tokens`, `max_tokens` beyond what the context has left is cut to it, and not refused. `adapter` is the name
    of the LoRA adapter that the model answers with. `record` is the key of what is stored of the request in
    `inference-responses`. With `notify`, its end is an event for webhooks. `tier` says how soon it
    is served. `forwarded` are the ids under which other Forebays wait for its answer, if their workers have asked.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    id: str
    completion_type: CompletionType
    model: str
    created_at: float
    deadline: float
    reply_to: str
    key: str | None = None
    stream: bool = False
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    return_prompt: bool = False
    prompt_logprobs: int | None = None
    sampling: Sampling = Field(default_factory=Sampling)
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    dimensions: int | None = None
    fit_max_tokens: bool = False
    adapter: str | None = None
    tier: Tier = Tier.DEFAULT
    record: str | None = None
    notify: bool = False
    forwarded: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The request as JSON: the schema version, and the fields that differ from their defaults."""
        fields = {name: value for name, value in self.__dict__.items() if value != _DEFAULTS.get(name)}
        if self.adapter is not None:
            fields["schema_version"] = ADAPTER_SCHEMA
        try:
            # Of 400 KB it takes 0.15 ms, and Pydantic's 1.0.
            return orjson.dumps(fields, default=_sampling)
        except orjson.JSONEncodeError:  # an integer of more than 64 bits
            return b'{"schema_version":%d,' % fields["schema_version"] + super().encode()[1:]

    @property
    def deferred(self) -> bool:
        """Whether it waits in the waiting room, and gives way to others."""
        return self.tier is not Tier.DEFAULT

    @property
    def service_tier(self) -> str:
        """The tier as clients know it."""
        return Tier.FLEX.value if self.tier is Tier.FLEX else Tier.DEFAULT.value

    @property
    def named_model(self) -> str:
        """What clients call the model, with its adapter."""
        return names.adapter_model(self.model, self.adapter)


_DEFAULTS: Final = {
    name: field.get_default(call_default_factory=True)
    for name, field in InferenceRequest.model_fields.items()
    if name != "schema_version"
}


def _sampling(sampling: Sampling) -> dict[str, Any]:
    return sampling.model_dump(mode="json", exclude_defaults=True)
