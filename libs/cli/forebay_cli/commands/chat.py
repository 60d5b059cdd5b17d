"""`forebay chat`: a conversation over the HTTP api; the answer is printed as it is generated.

It is not asynchronous, so that Ctrl-C reaches what waits: the prompt or the answer.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson
from forebay_cli.local.addresses import url_of
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

CONNECT_TIMEOUT_S = 5.0

REQUEST_ID_HEADER = "x-request-id"


class ChatError(ForebayError):
    """The api did not answer, or answered with an error."""


def chat(
    message: Annotated[str | None, typer.Argument(help="The question; without it, a conversation.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The api, with /v1.", show_default="of API_HOST and API_PORT")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key.", show_default="the first of API_KEYS")] = None,
    model: Annotated[str | None, typer.Option(help="Model.", show_default="the first that is served")] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a model over the api."""
    settings = load(ApiSettings)
    key = api_key or next((known.get_secret_value() for known in settings.api_keys), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = base_url or url_of(settings.api_host, settings.api_port) + "/v1"
    if as_json and message is None:
        raise ConfigurationError("--json is for one answer: give a MESSAGE")
    try:
        with httpx.Client(
            base_url=url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # The api bounds the time of an answer.
            event_hooks={"response": [_raise_for_error]},
        ) as client:
            chosen = model or _first_model(client)
            if message is None:
                _converse(url, client, chosen)
                return
            answer = _answer_as_json if as_json else _answer
            answer(client, chosen, [{"role": "user", "content": message}])
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"{url!r} is no address of an api: {exc}") from exc
    except httpx.TransportError as exc:
        raise _unreachable(url, exc) from exc


def _unreachable(url: str, exc: httpx.TransportError) -> ChatError:
    return ChatError(f"cannot reach the api at {url}: {str(exc) or type(exc).__name__}")


def _converse(url: str, client: httpx.Client, model: str) -> None:
    """Ask line by line until the input ends. An error is printed, and the conversation goes on."""
    console.say(f"talking to {model}; an empty line starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends")
    history: list[dict[str, str]] = []
    while (line := _read_line()) is not None:
        if not line.strip():
            history.clear()
            continue
        question = {"role": "user", "content": line}
        try:
            text = _answer(client, model, [*history, question])
        except ChatError as exc:
            console.fail(str(exc))
        except httpx.TransportError as exc:
            # An api that has started again answers the next question.
            console.fail(str(_unreachable(url, exc)))
        except KeyboardInterrupt:
            # The closed connection cancels the request.
            console.say(" (stopped)")
        else:
            history += [question, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def _first_model(client: httpx.Client) -> str:
    response = client.get("models")
    try:
        models = response.json()["data"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ChatError(f"{response.url} returned no list of models: is it the address of an api, with /v1?") from exc
    if not models:
        raise ChatError("the api serves no model yet")
    return str(models[0]["id"])


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
    with client.stream("POST", "chat/completions", json=body) as response:
        for piece in _pieces(response):
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
            raise ChatError(f"{_describe(event['error'])} ({_request(response)})")
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
    # An answer without [DONE] is not complete.
    console.stdout.out("")
    raise ChatError(f"the answer broke off ({_request(response)})")


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        described = _describe(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        described = response.text[:200] or response.reason_phrase
    again = f"; try again in {after} s" if (after := response.headers.get("Retry-After")) else ""
    raise ChatError(f"{described} (HTTP {response.status_code}{again}; {_request(response)})")


def _request(response: httpx.Response) -> str:
    """The request's id, for `forebay requests --id`."""
    return f"request {response.headers.get(REQUEST_ID_HEADER, 'unknown')}"


def _describe(error: dict[str, Any]) -> str:
    code = error.get("code") or error.get("type") or "error"
    return f"{code}: {error.get('message')}"
