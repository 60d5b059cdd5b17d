"""Any OpenAI-compatible server as a model: a request goes on as it came, and the answer comes back as text.

The server makes prompts, tool calls and reasoning itself. Nobody knows the tokens, so no answer can be resumed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Final

import orjson

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import (
    AdapterNotFound,
    ConfigurationError,
    InferenceFailed,
    InvalidRequest,
    LoopDetected,
)
from forebay_contracts.wire.request import GENERATION, CompletionType, InferenceRequest, Sampling
from forebay_contracts.wire.state import Usage
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Tokens, Used
from forebay_inference.engine.model import CANNOT_RESUME, ModelFacts
from forebay_inference.engine.protocol import EngineFault, EngineStatus
from forebay_inference.engine.served.dialect import MESSAGE_LENGTH
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.silence import until_silent

_LOOK_S: Final = 5.0
_PATHS: Final = {
    CompletionType.CHAT: "/v1/chat/completions",
    CompletionType.COMPLETION: "/v1/completions",
}
_REFUSALS: Final = frozenset({400, 404, 413, 422})
"""The answers that say that a request is at fault. 404 is an endpoint that the server has not."""
_FORMS: Final = ("text", "json_object", "json_schema")
_NO_TOKEN: Final = (0,)
"""Stands for the tokens of one piece of text: what is sent is counted, to find repetitions and holes."""


class OpenAIModel:
    """Asks the server at ENGINE_URL. Construct, `start`, `generate`, `close`."""

    completion_types: tuple[CompletionType, ...] = GENERATION
    adapters = False

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._http: Http | None = None
        self._name = settings.default_model
        self._watching: asyncio.Task[None] | None = None
        self._sequences = 0
        self._steps = 0
        self._fault: str | None = None

    async def start(self, progress: Callable[[str], None]) -> ModelFacts:
        """Wait for the server, and find the name of its model; see `Model.start`.

        Raises:
            ConfigurationError: it does not answer within ENGINE_START_TIMEOUT, or has several models and none is named
                DEFAULT_MODEL.
        """
        settings = self._settings
        key = settings.engine_api_key
        url = (settings.engine_url or "").rstrip("/").removesuffix("/v1")
        self._http = http = Http(url, None if key is None else key.get_secret_value())
        started = time.monotonic()
        while True:
            try:
                self._name = _name_of(settings.default_model, await _models(http), url)
                break
            except ServerFailed as exc:
                if exc.status is not None and (exc.status < 400 or exc.status in (401, 403)):
                    raise ConfigurationError(f"the server at {url}: {exc}") from exc
                if time.monotonic() - started > settings.engine_start_timeout:
                    raise ConfigurationError(f"no answer within {settings.engine_start_timeout:g} s: {exc}") from exc
                progress(f"waiting for {url}: {exc}")
            await asyncio.sleep(1)
        self._watching = asyncio.create_task(self._watch(http))
        return ModelFacts(None, "unknown", url)

    def can_resume(self, request: InferenceRequest) -> bool:
        """Never."""
        return False

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[Event, None]:
        """See `Model.generate`. Each piece of text counts as one token; `Used` says how many there were."""
        if request.adapter is not None:
            raise AdapterNotFound(request.model, request.adapter)
        if any(resume.values()):
            raise InferenceFailed(CANNOT_RESUME)
        if self._http is None or self._fault is not None:
            raise EngineFault(self._fault or "the engine is not started, or closed")
        body = _body(request, self._name)
        forwarded = {names.HTTP_FORWARDED: ",".join((*request.forwarded, request.id))}
        choices = range(max(len(request.prompts), 1) * request.n)
        missing = set(choices)
        accepted = False
        self._sequences += 1
        try:
            async with aclosing(self._http.events(_PATHS[request.completion_type], body, forwarded)) as chunks:
                async for chunk in chunks:
                    self._steps += 1
                    if (error := chunk.get("error")) is not None:
                        raise _event_fault(error)
                    if not accepted:
                        accepted = True
                        yield Accepted(0)
                    for choice in chunk.get("choices") or ():
                        if (index := choice["index"]) not in choices:
                            raise ValueError(index)
                        if (tokens := _tokens(index, choice)) is not None:
                            yield tokens
                        if reason := _text(choice.get("finish_reason")):
                            missing.discard(index)
                            yield Finished(index, reason)
                    if (usage := chunk.get("usage")) is not None and not chunk.get("choices"):
                        yield Used(_usage(usage))
        except ServerFailed as exc:
            raise _fault(exc) from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise EngineFault(f"the server's answer is not OpenAI's: {type(exc).__name__}") from exc
        finally:
            self._sequences -= 1
        if missing:
            raise EngineFault("the server ended an answer without saying why")

    def status(self) -> EngineStatus:
        """See `Model.status`. The pieces of text that have come are its steps."""
        return EngineStatus(self._fault, self._sequences, self._steps)

    async def _watch(self, http: Http) -> None:
        """Find out when the server answers no more. It may be started anew within that time."""
        patience_s = self._settings.engine_stall_timeout
        silence = await until_silent(lambda: _models(http), _LOOK_S, patience_s, gone_s=patience_s)
        self._fault = f"the server {silence}"

    async def close(self) -> None:
        """See `Model.close`."""
        http, self._http = self._http, None
        if self._watching is not None:
            self._watching.cancel()
        if http is not None:
            await http.close()


async def _models(http: Http) -> list[str] | None:
    """The names of the server's models; None where it does not tell them. Raises ServerFailed."""
    try:
        told = await http.json("/v1/models")
    except ServerFailed as exc:
        if exc.status in (404, 405):
            return None
        raise
    with suppress(KeyError, TypeError):
        return [str(one["id"]) for one in told["data"]]
    return None


def _name_of(wanted: str, models: list[str] | None, url: str) -> str:
    if not models or wanted in models:
        return wanted
    if len(models) == 1:
        return models[0]
    raise ConfigurationError(f"{url} has no model {wanted}: set DEFAULT_MODEL to one of {', '.join(models[:20])}")


def _body(request: InferenceRequest, model: str) -> dict[str, Any]:
    """The body of the request to the server. Raises InvalidRequest for what only tokens can serve."""
    if request.return_prompt or request.prompt_logprobs is not None:
        raise InvalidRequest("This model's engine knows no token ids.", param="return_token_ids")
    if request.sampling.logprobs is not None:
        raise InvalidRequest("This model's engine reports no log probabilities.", param="logprobs")
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "n": request.n}
    body |= _sampling(request.sampling)
    body |= _form(request.response_format)
    if request.completion_type is CompletionType.COMPLETION:
        if (request.best_of or request.n) > request.n:
            raise InvalidRequest("best_of greater than n is not served by this model's engine.", param="best_of")
        prompts: Any = request.prompts
        return body | {"prompt": prompts if len(prompts) > 1 else prompts[0], "echo": request.echo}
    body["messages"] = request.messages
    if request.tools:
        body |= {"tools": request.tools, "parallel_tool_calls": request.parallel_tool_calls}
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.chat_template_kwargs:
        body["chat_template_kwargs"] = request.chat_template_kwargs
    return body


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """What the client gave. What it left open is the server's to choose."""
    given = sampling.model_dump(exclude_defaults=True, exclude={"unset", "logprobs"})
    return {name: value for name, value in given.items() if name not in sampling.unset}


def _form(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    if wanted is None:
        return {}
    if wanted.get("type") not in _FORMS:
        param = str(wanted.get("param", "response_format"))
        raise InvalidRequest("This model's engine cannot enforce this form of an answer.", param=param)
    return {"response_format": {name: value for name, value in wanted.items() if name != "param"}}


def _tokens(index: int, choice: Mapping[str, Any]) -> Tokens | None:
    """The event of choice `index` of a chunk, None where it brings nothing."""
    delta: Mapping[str, Any] = choice.get("delta") or {"content": choice.get("text")}
    text = _text(delta.get("content"))
    reasoning = _text(delta.get("reasoning_content") or delta.get("reasoning"))
    calls = tuple(_call(place, call) for place, call in enumerate(delta.get("tool_calls") or ()))
    if not (text or reasoning or calls):
        return None
    return Tokens(index, _NO_TOKEN, text, tool_calls=calls, reasoning=reasoning)


def _call(place: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """A piece of a tool call. Some servers leave its index out, since they send each call whole."""
    function = call.get("function") or {}
    told = {name: _text(function[name]) for name in ("name", "arguments") if function.get(name) is not None}
    number = call.get("index")
    return {**call, "index": place if number is None else int(number), "function": told}


def _text(value: Any) -> str:
    """`value`, or nothing if it is None; the api drops a frame with anything else."""
    if not isinstance(value, str | None):
        raise TypeError
    return value or ""


def _usage(told: Mapping[str, Any]) -> Usage:
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (told.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return Usage(
        prompt_tokens=told["prompt_tokens"],
        completion_tokens=told.get("completion_tokens") or 0,
        cached_tokens=cached,
        reasoning_tokens=thought,
    )


def _fault(failed: ServerFailed) -> EngineFault | InvalidRequest | LoopDetected:
    if failed.status == LoopDetected.status:
        return LoopDetected("ENGINE_URL of the worker leads back to where the request has come from")
    if failed.status not in _REFUSALS:
        return EngineFault(f"the server failed: {failed}")
    with suppress(orjson.JSONDecodeError, AttributeError):
        if isinstance(error := orjson.loads(failed.detail).get("error"), dict):
            return _refusal(error)
    return InvalidRequest(f"The server refuses the request with status {failed.status}.")


def _event_fault(error: Any) -> EngineFault | InvalidRequest:
    """What an error means that came within a stream."""
    if isinstance(error, dict) and error.get("type") in ("invalid_request_error", "BadRequestError"):
        return _refusal(error)
    kind = error.get("type") if isinstance(error, dict) else None
    return EngineFault(f"the server broke off its answer ({kind or 'error'})")


def _refusal(error: Mapping[str, Any]) -> InvalidRequest:
    param, code = error.get("param"), error.get("code")
    return InvalidRequest(
        str(error.get("message") or "The server refuses the request.")[:MESSAGE_LENGTH],
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )
