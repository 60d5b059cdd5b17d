"""The HTTP client of the commands that ask an api."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import httpx
import typer

from forebay_cli.console import say_server
from forebay_cli.local.addresses import url_of
from forebay_cli.local.running import running
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

CONNECT_TIMEOUT_S = 5.0

REQUEST_ID_HEADER = "x-request-id"

BaseUrl = Annotated[
    str | None, typer.Option(help="The api.", show_default="API_HOST and API_PORT, else that of `forebay up`")
]

ApiKey = Annotated[str | None, typer.Option(help="Key.", show_default="the first of API_KEYS")]


class ApiFailure(ForebayError):
    """The api did not answer, or answered with an error."""


class ApiTarget(NamedTuple):
    """The api of a command: its URL, with /v1, the key to show, and what has named it. None: nothing has."""

    url: str
    key: str | None
    named_by: str | None

    def named(self) -> Self:
        """This target, for a command that changes something.

        Raises:
            ConfigurationError: nothing has named it. Whatever answers on the usual port may be another system.
        """
        if self.named_by is None:
            raise ConfigurationError(
                "no api is named, and no `forebay up` runs on DATA_DIR: give --base-url or --data-dir, or set API_PORT"
            )
        return self


def api_target(base_url: str | None, api_key: str | None, data_dir: Path | None = None) -> ApiTarget:
    """The api that --base-url names, or the `forebay up` of --data-dir, or API_HOST and API_PORT, or `forebay up`.

    Raises:
        ConfigurationError: a setting is wrong, or no `forebay up` runs on the --data-dir that is given.
    """
    settings = load(ApiSettings, **({} if data_dir is None else {"data_dir": data_dir}))
    key = api_key or next((known.get_secret_value() for known in settings.api_keys), None)
    is_set = not settings.model_fields_set.isdisjoint({"api_host", "api_port"})
    up = running(settings.data_dir) if base_url is None and (data_dir is not None or not is_set) else None
    if base_url is not None:
        return ApiTarget(_with_path(base_url), key, "--base-url")
    if up is not None:
        return ApiTarget(up.api_url + "/v1", key, f"`forebay up` on {settings.data_dir}")
    if data_dir is not None:
        raise ConfigurationError(f"no `forebay up` runs on --data-dir {data_dir}")
    url = url_of(settings.api_host, settings.api_port) + "/v1"
    return ApiTarget(url, key, "API_HOST and API_PORT" if is_set else None)


def _with_path(url: str) -> str:
    """`url`, with /v1 if it has no path: `forebay up` prints it without."""
    url = url.rstrip("/")
    return url if "/" in url.partition("://")[2] else f"{url}/v1"


@contextlib.contextmanager
def api_client(at: ApiTarget, timeout_s: float | None) -> Iterator[httpx.Client]:
    """A client of the api. `timeout_s`: how long an answer may take; None: as long as the api lets it.

    Raises:
        ApiFailure: the api does not answer, or answers with an error.
        ConfigurationError: `at` has no URL.
    """
    headers = {"Authorization": f"Bearer {at.key}"} if at.key else {}
    try:
        with httpx.Client(
            base_url=at.url + "/",
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            event_hooks={"response": [_raise_for_error]},
        ) as client:
            say_server(at.url.removesuffix("/v1"), at.named_by)
            yield client
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"{at.url!r} is no address of an api: {exc}") from exc
    except httpx.TransportError as exc:
        raise unreachable(at.url, exc) from exc


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
