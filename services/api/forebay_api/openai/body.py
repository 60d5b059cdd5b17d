"""What the bodies of OpenAI's endpoints have in common.

A parameter is honoured or refused by name. None is ignored in silence, except those that only describe the request to
OpenAI's own service (`user`, `metadata`, `store`, ...).
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, field_validator, model_validator

from forebay_contracts.wire.request import RECOMMENDABLE, InferenceRequest, Sampling

MAX_STOP_STRINGS = 4
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1

# As OpenAI, and unlike Pydantic's default: "2" and true are no numbers, 1 and "yes" are no booleans.
Bool = Annotated[bool, Field(strict=True)]
Int = Annotated[int, Field(strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], Field(fail_fast=True)]
"""A list whose validation stops at the first fault. To collect 100,000 faults takes seconds."""

Tokens = Annotated[Many[Annotated[Int, Field(ge=0)]], Field(min_length=1)]
"""A text as token ids."""

SLICE = 100


def _in_slices(value: Any, validate: Callable[[Any], Any]) -> Any:
    if not isinstance(value, dict):
        return validate(value)
    items = iter(value.items())
    valid: dict[Any, Any] = {}
    while part := dict(islice(items, SLICE)):
        valid |= validate(part)
    return valid


Name = TypeVar("Name", int, str)
Mapping = Annotated[dict[Name, Item], WrapValidator(_in_slices)]
"""An object whose validation stops at the first SLICE members with a fault."""


class Misfit(ValueError):
    """Parameters that do not fit together; `param` is the one to change, relative to its object."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def as_many(value: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
    """One or many prompts as many, each of them a text or a list of token ids."""
    return (value,) if isinstance(value, str) or isinstance(value[0], int) else value


class LenientModel(BaseModel):
    """An object whose unknown members are ignored: clients send back what other services added."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class OpenModel(BaseModel):
    """An object that keeps unknown members: chat templates may use them."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)


class StrictModel(BaseModel):
    """An object that refuses unknown parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Keep only the first of the unknown parameters: one is told, and more take long to collect."""
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        first = next(name for name in value if name not in cls.model_fields)
        return {name: value[name] for name in value if name in cls.model_fields or name == first}


class RequestBody(StrictModel):
    """The parameters of all endpoints."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, body: Any) -> Any:
        """OpenAI's clients send null for what is not set."""
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body

    @abstractmethod
    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue; `origin`: its fields that are not of the body."""


class StreamOptions(StrictModel):
    """`include_usage` asks for one last chunk with the token counts."""

    include_usage: Bool = False
    include_obfuscation: Bool = False


_SAMPLING = frozenset(Sampling.model_fields) - {"max_tokens", "logprobs", "unset"}
"""The parameters that have the same name and default in bodies and in `Sampling`."""


class GenerationBody(RequestBody):
    """The parameters of all endpoints that generate text."""

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
    logit_bias: Mapping[int, Annotated[Finite, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[Int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[Many[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)] = ()
    ignore_eos: Bool = False
    # Accepted without effect: they describe the request to OpenAI's own service.
    metadata: Mapping[str, str] | None = None
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

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """The sampling parameters, with those marked that the client left open."""
        given = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING}
        return Sampling(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            unset=tuple(name for name in RECOMMENDABLE if name not in given),
        )
