"""Without keys: which requests a page of another site may have sent."""

import socket

import pytest

from forebay_api.clients.cross_site import CrossSite, ForeignPage, NotJson, UnknownHost
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest

PORT = ":8091"
JSON = {"content-type": "application/json"}


def checked(
    method: str = "GET", headers: dict[str, str] | None = None, path: str = "/v1/models", **settings: str
) -> type[InvalidRequest] | None:
    """What the request is refused with; None if it is served."""
    given = {"host": "localhost:8091", **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    try:
        scope = {"type": "http", "method": method, "path": path, "headers": raw}
        CrossSite(load(ApiSettings, **settings)).check(scope)
    except InvalidRequest as exc:
        return type(exc)
    return None


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "app.localhost", socket.gethostname(), "api.internal"),
        *("127.0.0.1", "127.8.9.1", "[::1]", "0.0.0.0", "10.244.3.7", "192.168.1.5", "[fe80::1]", "203.0.113.7"),
        *("forebay.example.com", "a.b.example.org"),
    ],
)
def test_names_and_addresses_of_the_api(host: str) -> None:
    for written in (host, host + PORT):
        named = {"api_host": "api.internal", "allowed_hosts": "Forebay.example.com, *.example.org"}
        assert checked(headers={"host": written}, **named) is None


def test_a_client_without_a_host_is_no_browser() -> None:
    assert checked(headers={"host": ""}) is None


@pytest.mark.parametrize(
    "host",
    [
        *("attacker.example", "localhost.attacker.example", "127.0.0.1.nip.io", "notlocalhost", "example.org"),
        *("forebay.example.com.attacker.example", "xexample.org", "[::1", "::1", "localhost:80:90", "a b", "*"),
    ],
)
def test_a_name_that_is_not_the_apis(host: str) -> None:
    named = {"allowed_hosts": "forebay.example.com, *.example.org"}
    assert checked(headers={"host": host}, **named) is UnknownHost
    # Rebinding makes the page the api's own in the eyes of its browser.
    assert checked(headers={"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}) is UnknownHost


def test_any_name_can_be_allowed() -> None:
    assert checked(headers={"host": "anything.example"}, allowed_hosts="*") is None


@pytest.mark.parametrize(
    ("method", "headers", "served"),
    [
        ("POST", {"origin": "http://localhost:8091", "sec-fetch-site": "same-origin"}, True),
        ("POST", {"origin": "https://chat.example.com", "sec-fetch-site": "cross-site"}, True),
        ("POST", {"origin": "app://notes"}, True),
        ("GET", {"sec-fetch-site": "none", "sec-fetch-dest": "document"}, True),
        ("GET", {"sec-fetch-site": "same-origin"}, True),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, True),
        ("POST", {"origin": "https://attacker.example"}, False),
        ("POST", {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, False),
        ("POST", {"origin": "http://localhost"}, False),
        ("POST", {"origin": "null", "sec-fetch-site": "cross-site"}, False),
        ("POST", {"host": "", "origin": "null"}, False),
        ("DELETE", {"origin": "https://attacker.example"}, False),
        ("GET", {"origin": "https://attacker.example"}, False),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}, False),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe", "sec-fetch-mode": "navigate"}, False),
        ("GET", {"sec-fetch-site": "same-site", "sec-fetch-dest": "empty"}, False),
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, False),
    ],
)
def test_pages(method: str, headers: dict[str, str], served: bool) -> None:
    found = checked(method, JSON | headers, cors_origins="https://chat.example.com, app://notes")
    assert found is (None if served else ForeignPage)


@pytest.mark.parametrize(
    ("content_type", "served"),
    [
        *((value, True) for value in ("application/json", "Application/JSON; charset=utf-8", "application/ld+json")),
        *((value, False) for value in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")),
        *((value, False) for value in ("", "text/json", "application/jsonp", "text/plain; application/json", "json")),
    ],
)
def test_bodies_are_declared_as_json(content_type: str, served: bool) -> None:
    for body in ({"content-length": "2"}, {"transfer-encoding": "chunked"}):
        assert checked("POST", body | {"content-type": content_type}) is (None if served else NotJson)
    assert checked("POST", {"content-type": content_type, "content-length": "0"}) is None


def test_a_form_is_for_uploads_alone() -> None:
    form = {"content-type": "multipart/form-data; boundary=x", "content-length": "2"}
    assert checked("POST", form, path="/v1/files") is None
    assert checked("POST", form, path="/v1/batches") is NotJson
    assert checked("POST", JSON | {"content-length": "2"}, path="/v1/files") is NotJson
    assert checked("POST", form | {"origin": "https://attacker.example"}, path="/v1/files") is ForeignPage


def test_the_message_says_what_to_set() -> None:
    for headers, setting in (
        ({"host": "a.example"}, "ALLOWED_HOSTS"),
        ({"origin": "http://a.example"}, "CORS_ORIGINS"),
    ):
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        with pytest.raises(InvalidRequest, match=f"a.example.*{setting}"):
            CrossSite(ApiSettings()).check({"type": "http", "method": "GET", "path": "/", "headers": raw})


@pytest.mark.parametrize("value", ["http://a.example", "a.example:80", "a.*", "**.a", "a..b", "a b"])
def test_a_host_is_a_name(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"ALLOWED_HOSTS=.*a host is like forebay\.example\.com"):
        load(ApiSettings, allowed_hosts=value)  # type: ignore[arg-type]
