"""What the bodies of OpenAI's endpoints have in common.

A parameter is honoured or refused by name. None is ignored in silence, except those that only describe the request to
OpenAI's own service (`user`, `metadata`, `store`, ...).
"""

from abc import abstractmethod
from collections.abc import Callable, Set
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator

from forebay_contracts.wire.request import InferenceRequest

MAX_CHOICES = 128

# As OpenAI, and unlike Pydantic's default: "2" and true are no numbers, 1 and "yes" are no booleans.
Bool = Annotated[bool, Field(strict=True)]
Int = Annotated[int, Field(strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], Field(fail_fast=True)]
"""A list whose validation stops at the first fault. To collect 100,000 faults takes seconds."""

Tokens = Annotated[Many[Annotated[Int, Field(ge=0)]], Field(min_length=1)]
"""A text as token ids."""

ServiceTier = Literal["auto", "default", "flex", "priority"]
"""`priority` is served as `default` is, and `auto` as the client's key says."""

SLICE = 100
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


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


def bounded(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata, if it may be kept. Raises ValueError."""
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"expected at most {MAX_METADATA} pairs")
    for name, value in metadata.items():
        if len(name) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise ValueError(
                f"expected keys of at most {MAX_METADATA_KEY} and values of at most {MAX_METADATA_VALUE} characters"
            )
    return metadata


Metadata = Annotated[Mapping[str, str], AfterValidator(bounded)]
"""Pairs that are kept with an object."""


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


@cache
def _names_of(model: type[BaseModel]) -> Set[str]:
    """The names of its members in JSON."""
    return {field.alias or name for name, field in model.model_fields.items()}


class StrictModel(BaseModel):
    """An object that refuses unknown parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Keep only the first of the unknown parameters: the error names one, and more take long to collect."""
        if not isinstance(value, dict) or value.keys() <= (known := _names_of(cls)):
            return value
        first = next(name for name in value if name not in known)
        return {name: value[name] for name in value if name in known or name == first}


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
