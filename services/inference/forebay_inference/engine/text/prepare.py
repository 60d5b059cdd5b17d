"""A request made ready for an engine: its prompts, its limits, its grammar. Everything that may refuse it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Sampling
from forebay_inference.engine.protocol import Capabilities, LoadedModel, Tokenizer
from forebay_inference.engine.text.detokenizer import Context, Decoder
from forebay_inference.engine.text.grammars import Compiler, FaultOf, function_grammars, grammar_of
from forebay_inference.engine.text.harmony import Harmony
from forebay_inference.engine.text.reasoning import Thinking
from forebay_inference.engine.text.templates import Chat, encode_chat, encode_prompt, require_known
from forebay_inference.engine.text.tool_formats import ToolFormat, ToolUse, tool_use


class Prompt(NamedTuple):
    """One prompt: its tokens, how many may follow them (`limit`), and what is shown before its answer (`echo`).

    The text of an answer goes on after `context`; without one it begins anew, as a chat's does.
    """

    tokens: list[int]
    limit: int
    echo: str
    context: Context | None


class Prepared(NamedTuple):
    """What the choices of a request have in common. `opened`: they begin within reasoning."""

    prompts: list[Prompt]
    tools: ToolUse | None
    grammar: Any
    end_tokens: frozenset[int]
    opened: bool

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


def prepare(
    request: InferenceRequest,
    loaded: LoadedModel,
    can: Capabilities,
    form: ToolFormat,
    chat: Chat,
    reasoning: Thinking | Harmony | None,
    decoder: Decoder,
    *,
    closed_schemas: bool = True,
) -> Prepared:
    """Make `request` ready for an engine that serves `loaded`. For `closed_schemas` see `enforceable`.

    Raises:
        InvalidRequest: it cannot be served as it stands.
    """
    _refuse_what_is_not_served(request, loaded.tokenizer, can)
    use = tool_use(request, form)
    opened = False
    if request.completion_type is CompletionType.CHAT:
        text = chat.prompt(request)
        encoded = [encode_chat(loaded.tokenizer, text)]
        goes_on = request.chat_template_kwargs.get("continue_final_message")
        continued = str(request.messages[-1].get("content") or "") if goes_on else ""
        opened = isinstance(reasoning, Thinking) and reasoning.opened(text, continued)
    else:
        encoded = [encode_prompt(loaded.tokenizer, prompt) for prompt in request.prompts]
        reasoning = None
    grammar = None
    if request.response_format is not None or use is not None:
        compiler = Compiler(loaded.compile)
        fault_of = compiler.fault if can.grammars != "no" else None
        grammar = compiler.compiled(_grammar(request, use, fault_of, reasoning, opened=opened, closed=closed_schemas))
    prompts = [_prompt(request, index, tokens, loaded.context_length, decoder) for index, tokens in enumerate(encoded)]
    # A grammar ends an answer with the end token and cannot go on after it.
    end_tokens = loaded.end_tokens
    if grammar is None and request.sampling.ignore_eos:
        end_tokens = frozenset()
    elif isinstance(reasoning, Harmony):
        end_tokens |= reasoning.end_tokens
    if request.sampling.stop_token_ids:
        end_tokens = end_tokens.union(request.sampling.stop_token_ids)
    return Prepared(prompts, use, grammar, end_tokens, opened)


def _grammar(
    request: InferenceRequest,
    use: ToolUse | None,
    fault_of: FaultOf | None,
    reasoning: Thinking | Harmony | None,
    *,
    opened: bool,
    closed: bool,
) -> str | None:
    """The grammar of the answer, which applies once the reasoning has ended."""
    match reasoning:
        case Thinking():
            grammar = grammar_of(request.response_format, use, fault_of, closed=closed)
            return None if grammar is None else reasoning.before(grammar, opened=opened)
        case Harmony():
            answer = grammar_of(request.response_format, None, fault_of, closed=closed)
            if answer is None and not (use is not None and use.required):
                return None
            wanted = {} if use is None else function_grammars(use, fault_of, closed=closed)
            return reasoning.grammar(None if use is not None and use.required else answer, wanted)
        case None:
            return grammar_of(request.response_format, use, fault_of, closed=closed)


def _refuse_what_is_not_served(request: InferenceRequest, tokenizer: Tokenizer, can: Capabilities) -> None:
    sampling = request.sampling
    if request.prompt_logprobs is not None and not can.prompt_logprobs:
        fault = "This model's engine reports no log probabilities of a prompt"
        param = "echo" if request.echo else "prompt_logprobs"
        raise InvalidRequest(f"{fault}, which {param} asks for.", param=param)
    if request.echo and sampling.logprobs is not None and request.prompt_logprobs is None:
        raise InvalidRequest("echo cannot be combined with logprobs.", param="echo")
    if request.best_of is not None and request.best_of < request.n:
        raise InvalidRequest("best_of must be at least n.", param="best_of")
    if request.best_of is not None and request.best_of > request.n:
        # Those that are served have become requests for more choices.
        why = "cannot be streamed" if request.stream else "needs log probabilities, which this model's engine lacks"
        raise InvalidRequest(f"best_of greater than n {why}.", param="best_of")
    if sampling.logprobs is not None and not can.logprobs:
        raise InvalidRequest("This model's engine reports no log probabilities.", param="logprobs")
    for name in given(sampling, can.refused):
        raise InvalidRequest(f"This model's engine does not support {name}.", param=name)
    require_known(sampling.logit_bias, tokenizer.vocabulary_size, "logit_bias")
    require_known(sampling.stop_token_ids, tokenizer.vocabulary_size, "stop_token_ids")


def given(sampling: Sampling, names: Iterable[str]) -> list[str]:
    """Those of the fields `names` that are not at their default."""
    return [name for name in names if getattr(sampling, name) != Sampling.model_fields[name].default]


def _prompt(request: InferenceRequest, index: int, tokens: list[int], context_length: int, decoder: Decoder) -> Prompt:
    limit = _new_tokens(request, len(tokens), context_length)
    if request.completion_type is CompletionType.CHAT:
        goes_on = request.chat_template_kwargs.get("continue_final_message")
        return Prompt(tokens, limit, "", decoder.context(tokens, whole=True) if goes_on else None)
    given = request.prompts[index]
    context = decoder.context(tokens, whole=isinstance(given, str))
    if isinstance(given, str) or not request.echo:
        return Prompt(tokens, limit, str(given) if request.echo else "", context)
    # A character that the prompt begins and the answer ends is shown with the answer, if there is one.
    shown = tokens[: len(tokens) - len(context.pending)] if limit else tokens
    return Prompt(tokens, limit, decoder.decode(shown), context)


def _new_tokens(request: InferenceRequest, prompt: int, context: int) -> int:
    """How many tokens may follow a prompt of `prompt` tokens."""
    wanted = request.sampling.max_tokens
    param = "messages" if request.completion_type is CompletionType.CHAT else "prompt"
    if prompt + (1 if wanted is None else 0) > context:
        fault = f"your {param} resulted in {prompt} tokens. Please reduce the length of the {param}."
    elif wanted is not None and prompt + wanted > context and not request.fit_max_tokens:
        fault = (
            f"you requested {prompt + wanted} tokens ({prompt} in the {param}, {wanted} in the completion). "
            f"Please reduce the length of the {param} or completion."
        )
    else:
        return context - prompt if wanted is None else min(wanted, context - prompt)
    raise InvalidRequest(
        f"This model's maximum context length is {context} tokens. However, {fault}",
        param=param,
        code="context_length_exceeded",
    )
