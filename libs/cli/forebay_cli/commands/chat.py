"""`forebay chat`: a conversation over the HTTP api; the answer is printed as it is generated.

It is not asynchronous, so that Ctrl-C reaches what waits: the prompt or the answer.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Final

import httpx
import typer

from forebay_cli import console, prompt, queue_place
from forebay_cli.api_client import (
    REQUEST_ID_HEADER,
    ApiFailure,
    ApiKey,
    BaseUrl,
    api_client,
    api_target,
    describe,
    request_of,
    unreachable,
)
from forebay_cli.declarations import AsJson, DataDir
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ConfigurationError

ANSWER_TIMEOUT_S: Final = None
"""The api bounds the time of an answer."""


def chat(
    message: Annotated[str | None, typer.Argument(help="The question; without it, a conversation.")] = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="Model.", show_default="the first that is served")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a model over the api."""
    if as_json and message is None:
        raise ConfigurationError("--json is for one answer: give a MESSAGE")
    with api_client(api_target(base_url, api_key, data_dir), ANSWER_TIMEOUT_S) as client:
        talk(client, model or _first_model(client), message, as_json=as_json)


def talk(client: httpx.Client, model: str, message: str | None, *, as_json: bool = False) -> None:
    """Print the answer to `message`; without one, hold a conversation.

    Raises:
        ApiFailure: the api does not answer, or answers with an error.
    """
    if message is None:
        _converse(client, model)
        return
    answer = _answer_as_json if as_json else _answer
    answer(client, model, [{"role": "user", "content": message}])


def _converse(client: httpx.Client, model: str) -> None:
    """Ask one message after another until the input ends. An error is printed, and the conversation goes on."""
    console.say(f"talking to {model}; an empty line starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends")
    read = prompt.reader(load(Settings).data_dir / "chat_history")
    history: list[dict[str, str]] = []
    while (line := _read(read)) is not None:
        if not line.strip():
            history.clear()
            continue
        question = {"role": "user", "content": line}
        try:
            text = _answer(client, model, [*history, question])
        except ApiFailure as exc:
            console.fail(str(exc))
        except httpx.TransportError as exc:
            # An api that has started again answers the next question.
            console.fail(str(unreachable(client.base_url, exc)))
        except KeyboardInterrupt:
            # The closed connection cancels the request.
            console.say(" (stopped)")
        else:
            history += [question, {"role": "assistant", "content": text}]


def _read(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except (EOFError, KeyboardInterrupt):
        return None


def _first_model(client: httpx.Client) -> str:
    response = client.get("models")
    try:
        models = response.json()["data"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ApiFailure(f"{response.url} returned no list of models: is it the address of an api, with /v1?") from exc
    if not models:
        raise ApiFailure("the api serves no model yet")
    # DEFAULT_MODEL comes first, though it may have no worker.
    return str(next((one for one in models if one.get("status") != "no_worker"), models[0])["id"])


def _answer_as_json(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> None:
    """Print the whole answer. Its `id` is what `forebay requests --id` takes."""
    response = client.post("chat/completions", json={"model": model, "messages": messages})
    answer = response.json()
    (choice,) = answer["choices"]
    console.print_json(
        {
            "id": response.headers.get(REQUEST_ID_HEADER),
            "model": answer["model"],
            "content": choice["message"]["content"],
            "finish_reason": choice["finish_reason"],
            "usage": answer["usage"],
        }
    )


def _answer(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    """Print the answer as it is generated; returns the whole."""
    text = ""
    body = {"model": model, "messages": messages, "stream": True}
    watched = console.stdout.is_terminal
    with (
        client.stream("POST", "chat/completions", json=body, headers=queue_place.EARLY if watched else {}) as response,
        queue_place.shown(client, response) if watched else contextlib.nullcontext() as arrived,
    ):
        for piece in _pieces(response):
            if arrived is not None and piece:
                arrived()
            text += piece
            console.stdout.out(piece, end="")
    console.stdout.out("")
    return text


def _pieces(response: httpx.Response) -> Iterator[str]:
    """The text of the answer, delta by delta, from the server-sent events."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:
            continue
        event = json.loads(data)
        if "error" in event:
            console.stdout.out("")
            raise ApiFailure(f"{describe(event['error'])} ({request_of(response)})")
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
    # An answer without [DONE] is not complete.
    console.stdout.out("")
    raise ApiFailure(f"the answer broke off ({request_of(response)})")
