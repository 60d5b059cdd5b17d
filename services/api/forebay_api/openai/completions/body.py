"""The body of `POST /v1/completions`.

Source: https://platform.openai.com/docs/api-reference/completions/create.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from forebay_api.openai.body import MAX_CHOICES, Bool, Int, Many, Misfit, Tokens, as_many
from forebay_api.openai.generation import GenerationBody, unlimited
from forebay_contracts.wire.request import InferenceRequest

MAX_LOGPROBS = 5

Prompt = str | Tokens | Annotated[Many[str], Field(min_length=1)] | Annotated[Many[Tokens], Field(min_length=1)]


class CompletionBody(GenerationBody):
    """Continue a prompt."""

    prompt: Prompt
    max_tokens: Annotated[Annotated[Int, Field(ge=0)] | None, BeforeValidator(unlimited)] = 16
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: Bool = False
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Literal[""] = ""
    add_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None:
            if self.best_of < self.n:
                raise Misfit("best_of", "best_of must be at least n")
            if self.stream and self.best_of > self.n:
                raise Misfit("best_of", "best_of larger than n cannot be streamed")
        if self.max_tokens == 0 and not (self.echo or self.return_prompt):
            raise Misfit("max_tokens", "max_tokens=0 is only of use with echo")
        if len(self.prompts) * (self.best_of or self.n) > MAX_CHOICES:
            raise Misfit("prompt", f"at most {MAX_CHOICES} choices over all prompts")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's tokens."""
        return self.max_tokens

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, one or many, as text or token ids."""
        return as_many(self.prompt)

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue."""
        scored = self.logprobs if self.echo else None
        if self.prompt_logprobs is not None:
            scored = max(self.prompt_logprobs, scored or 0)
        return InferenceRequest(
            **origin,
            stream=self.stream,
            prompts=self.prompts,
            n=self.n,
            best_of=self.best_of if self.best_of != self.n else None,
            echo=self.echo,
            return_prompt=self.return_prompt or scored is not None,
            prompt_logprobs=scored,
            sampling=self.sampling(logprobs=self.logprobs),
            response_format=self.form(),
        )
