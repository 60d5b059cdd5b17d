"""The parameters of the endpoints that generate text."""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forebay_api.openai.body import (
    MAX_CHOICES,
    Bool,
    Finite,
    Int,
    Many,
    Mapping,
    Misfit,
    RequestBody,
    ServiceTier,
    StrictModel,
)
from forebay_api.openai.forms import FORMS, Alternatives, Pattern, ResponseFormat, Schema, StructuredOutputs, form_of
from forebay_contracts.wire.request import RECOMMENDABLE, Sampling

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_PROMPT_LOGPROBS = 20


def unlimited(value: Any) -> Any:
    """A limit of -1 is none, as with llama.cpp."""
    return None if value == -1 and not isinstance(value, bool) else value


class StreamOptions(StrictModel):
    """`include_usage` asks for one last chunk with the token counts, with `continuous_usage_stats` for those so far in
    every chunk."""

    include_usage: Bool = False
    continuous_usage_stats: Bool = False
    include_obfuscation: Bool = False


_SAMPLING = frozenset(Sampling.model_fields) - {"max_tokens", "logprobs", "unset"}
"""The parameters that have the same name and default in bodies and in `Sampling`."""


class GenerationBody(RequestBody):
    """The parameters of all endpoints that generate text."""

    stream: Bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Int, Field(ge=-1)] = 0
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: Mapping[int, Annotated[Finite, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[Int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[Many[str], Field(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[Many[Annotated[Int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    min_tokens: Annotated[Int, Field(ge=0)] = 0
    ignore_eos: Bool = False
    return_token_ids: Bool = False
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = None
    service_tier: ServiceTier | None = None
    # The form of the answer, by one of these.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: Pattern | None = None
    grammar: Pattern | None = None
    # Accepted only with the value that changes nothing.
    use_beam_search: Literal[False] = False
    skip_special_tokens: Literal[True] = True
    include_stop_str_in_output: Literal[False] = False
    # With an effect on a chat alone, which is stored.
    metadata: Mapping[str, str] | None = None
    store: Bool | None = None
    # Accepted without effect: they describe the request to another service, or only matter with what is refused.
    spaces_between_special_tokens: Bool | None = None
    length_penalty: Finite | None = None
    keep_alive: str | Int | Finite | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> Any:
        """One or many; an empty string stops nothing."""
        given = (value,) if isinstance(value, str) else value
        return [stop for stop in given if stop != ""] if isinstance(given, list | tuple) else given

    @field_validator("top_k")
    @classmethod
    def _all_tokens(cls, value: int) -> int:
        return max(value, 0)

    @model_validator(mode="after")
    def _parameters_fit(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Misfit("stream_options", "stream_options is only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise Misfit("prompt_logprobs", "prompt_logprobs is only allowed when stream is false")
        if self.min_tokens and self.most_tokens is not None and self.min_tokens > self.most_tokens:
            raise Misfit("min_tokens", f"min_tokens must be at most max_tokens, which is {self.most_tokens}")
        if len(self.model_fields_set & FORMS) > 1 or self.structured_outputs is not None:
            self.form()
        return self

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk tells the tokens so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    def return_prompt(self) -> bool:
        """Whether the answer needs the tokens of its prompt."""
        return self.return_token_ids or self.prompt_logprobs is not None or self.continuous_usage

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """The limit of the answer's tokens."""

    def form(self) -> dict[str, Any] | None:
        """The form that the answer must have, as it goes into the queue; None for any text. Raises Misfit for two."""
        said = self.model_fields_set & FORMS
        return form_of({name: getattr(self, name) for name in sorted(said)}) if said else None

    def sampling(self, *, logprobs: int | None) -> Sampling:
        """The sampling parameters, with those marked that the client left open."""
        given = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING}
        return Sampling(
            **given,
            max_tokens=self.most_tokens,
            logprobs=logprobs,
            unset=tuple(name for name in RECOMMENDABLE if name not in given),
        )
