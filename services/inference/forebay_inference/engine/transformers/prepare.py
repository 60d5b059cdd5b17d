"""A request made ready for the batch: its prompts, its limits, its grammar. Everything that may refuse it."""

from collections.abc import Sequence
from dataclasses import dataclass

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.text.templates import encode_prompts
from forebay_inference.engine.text.tool_formats import ToolFormat, ToolUse, tool_use
from forebay_inference.engine.transformers.guided import Grammars
from forebay_inference.engine.transformers.loading import Loaded


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the choices of a request have in common. `limits`: for each prompt, how many tokens may follow it.
    `echoes`: for each prompt, what is shown before its answer."""

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    echoes: tuple[str, ...]
    tools: ToolUse | None
    grammar: str | None
    end_tokens: frozenset[int]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(map(len, self.prompts))


def prepare(
    request: InferenceRequest, loaded: Loaded, form: ToolFormat, grammars: Grammars, context_length: int
) -> Prepared:
    """Make `request` ready for a model whose sequences have at most `context_length` tokens.

    Raises:
        InvalidRequest: it cannot be served as it stands.
    """
    _refuse_what_is_not_served(request)
    use = tool_use(request, form)
    grammar = grammars.grammar(request.response_format, use)
    prompts = encode_prompts(loaded.tokenizer, request, form)
    limits = tuple(_new_tokens(request, prompt, context_length) for prompt in prompts)
    echoes = tuple(_echo(request, loaded, index, prompt) for index, prompt in enumerate(prompts))
    # A grammar ends an answer with the end token and cannot go on after it.
    ends = frozenset() if request.sampling.ignore_eos and grammar is None else loaded.end_tokens
    return Prepared(tuple(map(tuple, prompts)), limits, echoes, use, grammar, ends)


def _refuse_what_is_not_served(request: InferenceRequest) -> None:
    sampling = request.sampling
    if request.echo and sampling.logprobs is not None:
        raise InvalidRequest("echo cannot be combined with logprobs.", param="echo")
    if request.best_of is not None and request.best_of < request.n:
        raise InvalidRequest("best_of must be at least n.", param="best_of")
    if request.best_of is not None and request.best_of > request.n and request.stream:
        raise InvalidRequest("best_of greater than n cannot be streamed.", param="best_of")


def _echo(request: InferenceRequest, loaded: Loaded, index: int, prompt: Sequence[int]) -> str:
    if not request.echo:
        return ""
    given = request.prompts[index]
    return given if isinstance(given, str) else str(loaded.tokenizer.decode(list(prompt), skip_special_tokens=True))


def _new_tokens(request: InferenceRequest, prompt: Sequence[int], context: int) -> int:
    wanted = request.sampling.max_tokens
    param = "messages" if request.completion_type is CompletionType.CHAT else "prompt"
    start = f"This model's maximum context length is {context} tokens. However, "
    code = "context_length_exceeded"
    if len(prompt) + (1 if wanted is None else 0) > context:
        raise InvalidRequest(
            f"{start}your {param} resulted in {len(prompt)} tokens. Please reduce the length of the {param}.",
            param=param,
            code=code,
        )
    if wanted is None:
        return context - len(prompt)
    if len(prompt) + wanted > context:
        raise InvalidRequest(
            f"{start}you requested {len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the "
            f"completion). Please reduce the length of the {param} or completion.",
            param=param,
            code=code,
        )
    return wanted
