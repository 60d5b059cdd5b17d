"""`forebay chat`: a conversation over the HTTP api, the answer shown as it is made.

Not asynchronous, so that Ctrl-C reaches what waits: the prompt, or the answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from forebay_cli import console
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

CONNECT_TIMEOUT_S = 5.0

REQUEST_ID_HEADER = "x-request-id"


class ChatError(ForebayError):
    """The api did not answer, or answered with an error."""


@dataclass(frozen=True)
class Api:
    """Where the api is, and who asks."""

    base_url: str
    api_key: str | None

    def client(self) -> httpx.Client:
        """An HTTP client; an answer may take as long as the api lets it."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        return httpx.Client(base_url=self.base_url.rstrip("/") + "/", headers=headers, timeout=timeout)


def chat(api: Api, model: str | None, message: str | None, *, as_json: bool = False) -> None:
    """Ask once, or, without a message, hold a conversation until the input ends.

    Raises:
        ConfigurationError: JSON is wanted of a conversation, or the address is none.
        ChatError: the one question was not answered. In a conversation errors are printed, and it goes on.
    """
    if as_json and message is None:
        raise ConfigurationError("--json is for one answer: give a MESSAGE")
    try:
        with api.client() as client:
            chosen = model or _first_model(client)
            if message is None:
                _converse(api, client, chosen)
                return
            ask = _answer_as_json if as_json else _answer
            ask(client, chosen, [{"role": "user", "content": message}])
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"{api.base_url!r} is no address of an api: {exc}") from exc
    except httpx.TransportError as exc:
        raise _unreachable(api, exc) from exc


def _unreachable(api: Api, exc: httpx.TransportError) -> ChatError:
    return ChatError(f"cannot reach the api at {api.base_url}: {str(exc) or type(exc).__name__}")


def _converse(api: Api, client: httpx.Client, model: str) -> None:
    console.say(f"talking to {model}; an empty line begins anew, Ctrl-C stops an answer, Ctrl-D ends")
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
            continue
        except httpx.TransportError as exc:
            # An api that is started again is there for the next question.
            console.fail(str(_unreachable(api, exc)))
            continue
        except KeyboardInterrupt:
            # Closing the connection calls the request off; the conversation goes on without it.
            console.say(" (stopped)")
            continue
        history += [question, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def _first_model(client: httpx.Client) -> str:
    response = client.get("models")
    _raise_for_error(response)
    try:
        models = response.json()["data"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ChatError(f"{response.url} is no list of models: is that the address of an api, with /v1?") from exc
    if not models:
        raise ChatError("the api serves no model yet")
    return str(models[0]["id"])


def _answer_as_json(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> None:
    """Print the answer once it is whole; its id is the one that `forebay requests --id` takes."""
    response = client.post("chat/completions", json={"model": model, "messages": messages})
    _raise_for_error(response)
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
    """Print the answer as it comes; the whole of it."""
    text = ""
    with client.stream(
        "POST", "chat/completions", json={"model": model, "messages": messages, "stream": True}
    ) as response:
        if response.is_error:
            response.read()
            _raise_for_error(response)
        for piece in _pieces(response):
            text += piece
            console.stdout.out(piece, end="")
    console.stdout.out("")
    return text


def _pieces(response: httpx.Response) -> Iterator[str]:
    """The text of the answer, piece by piece, from the server-sent events."""
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
    # An answer without its end is broken, however good it looks.
    console.stdout.out("")
    raise ChatError(f"the answer broke off ({_request(response)})")


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        described = _describe(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        described = response.text[:200] or response.reason_phrase
    again = f"; try again in {after} s" if (after := response.headers.get("Retry-After")) else ""
    raise ChatError(f"{described} (HTTP {response.status_code}{again}; {_request(response)})")


def _request(response: httpx.Response) -> str:
    """Which one it was, for `forebay requests --id`."""
    return f"request {response.headers.get(REQUEST_ID_HEADER, 'unknown')}"


def _describe(error: dict[str, Any]) -> str:
    code = error.get("code") or error.get("type") or "error"
    return f"{code}: {error.get('message')}"
