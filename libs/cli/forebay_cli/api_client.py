"""The HTTP client of the commands that ask an api."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from forebay_cli.local.addresses import url_of
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

CONNECT_TIMEOUT_S = 5.0

REQUEST_ID_HEADER = "x-request-id"

BaseUrl = Annotated[str | None, typer.Option(help="The api, with /v1.", show_default="of API_HOST and API_PORT")]

ApiKey = Annotated[str | None, typer.Option(help="Key.", show_default="the first of API_KEYS")]


class ApiFailure(ForebayError):
    """The api did not answer, or answered with an error."""


@contextlib.contextmanager
def api_client(base_url: str | None, api_key: str | None, timeout_s: float | None) -> Iterator[httpx.Client]:
    """A client of the api. `timeout_s`: how long an answer may take; None: as long as the api lets it.

    Raises:
        ApiFailure: the api does not answer, or answers with an error.
        ConfigurationError: `base_url` is no URL.
    """
    settings = load(ApiSettings)
    key = api_key or next((known.get_secret_value() for known in settings.api_keys), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = base_url or url_of(settings.api_host, settings.api_port) + "/v1"
    try:
        with httpx.Client(
            base_url=url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            event_hooks={"response": [_raise_for_error]},
        ) as client:
            yield client
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"{url!r} is no address of an api: {exc}") from exc
    except httpx.TransportError as exc:
        raise unreachable(url, exc) from exc


def unreachable(url: object, exc: httpx.TransportError) -> ApiFailure:
    """What to say of an api that does not answer."""
    return ApiFailure(f"cannot reach the api at {url}: {str(exc) or type(exc).__name__}")


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        described = describe(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        described = response.text[:200] or response.reason_phrase
    again = f"; try again in {after} s" if (after := response.headers.get("Retry-After")) else ""
    raise ApiFailure(f"{described} (HTTP {response.status_code}{again}; {request_of(response)})")


def request_of(response: httpx.Response) -> str:
    """The request's id, for `forebay requests --id`."""
    return f"request {response.headers.get(REQUEST_ID_HEADER, 'unknown')}"


def describe(error: dict[str, Any]) -> str:
    """An error object of the api in a line."""
    code = error.get("code") or error.get("type") or "error"
    return f"{code}: {error.get('message')}"
