"""An api without keys serves programs and its own page, and no page of another site.

A browser lets every page send requests to addresses that only its user can reach, such as localhost. It names the page
in `Origin` and `Sec-Fetch-Site` (https://www.w3.org/TR/fetch-metadata/). A page that resolves its own name to the api's
address (DNS rebinding) counts as the api's own, and only `Host` shows the name.
"""

import functools
import ipaddress
import re
import socket
from fnmatch import fnmatchcase
from typing import Final

from starlette.types import Scope

from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import InvalidRequest

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^:]+)(:\d*)?")
_JSON: Final = re.compile(rb"\s*application/(json|[!#$&^_.+\w-]+\+json)\s*(;.*)?", re.I | re.S)
_FORM: Final = re.compile(rb"\s*multipart/form-data\s*;.*", re.I | re.S)
_UPLOADS: Final = "/v1/files"
"""The one path that takes a form. A browser sends the `Origin` of the page with each, which is checked first."""

_AS_JSON: Final = "JSON: send the header `Content-Type: application/json"
_HEADERS: Final = frozenset(
    (
        *(b"host", b"origin", b"sec-fetch-site", b"sec-fetch-dest"),
        *(b"content-type", b"content-length", b"transfer-encoding"),
    )
)


class UnknownHost(InvalidRequest):
    """Without keys: the client asks by a name that is not in ALLOWED_HOSTS."""

    status = 421
    code = "unknown_host"


class ForeignPage(InvalidRequest):
    """Without keys: the page that asks has an origin that is not in CORS_ORIGINS."""

    status = 403
    code = "foreign_origin"


class NotJson(InvalidRequest):
    """Without keys: the body is not declared as JSON, or an upload not as a form.

    A page may send other types to another site without asking.
    """

    status = 415
    code = "unsupported_media_type"


class CrossSite:
    """Tells requests of other sites' pages by their headers."""

    def __init__(self, settings: ApiSettings) -> None:
        self._hosts = ("localhost", "*.localhost", socket.gethostname(), settings.api_host, *settings.allowed_hosts)
        self._origins = frozenset(origin.encode() for origin in settings.cors_origins)
        self._is_known = functools.lru_cache(256)(self._matches)

    def check(self, scope: Scope) -> None:
        """Raises UnknownHost, ForeignPage or NotJson."""
        found = {name: value for name, value in scope["headers"] if name in _HEADERS}
        host, origin = found.get(b"host", b""), found.get(b"origin")
        if not self._is_known(host):
            raise UnknownHost(f"This api has no name {_shown(host)}: put it into ALLOWED_HOSTS, or set API_KEYS.")
        if origin is None:
            site, method = found.get(b"sec-fetch-site", b"none"), scope["method"]
            # Whoever follows a link sees the answer. The page with the link does not.
            follows_link = method == "GET" and found.get(b"sec-fetch-dest") == b"document"
            if site not in (b"none", b"same-origin") and not follows_link:
                raise ForeignPage("Pages of other sites may not use this api: put their origins into CORS_ORIGINS.")
        elif origin not in self._origins and origin.partition(b"://")[2] != (host or None):
            raise ForeignPage(f"Pages of {_shown(origin)} may not use this api: put the origin into CORS_ORIGINS.")
        has_body = b"transfer-encoding" in found or found.get(b"content-length", b"0") != b"0"
        uploads = scope["path"] == _UPLOADS
        declared = (_FORM if uploads else _JSON).fullmatch(found.get(b"content-type", b""))
        if scope["method"] == "POST" and has_body and declared is None:
            wanted = "a form: send the header `Content-Type: multipart/form-data" if uploads else _AS_JSON
            raise NotJson(f"The body must be declared as {wanted}`.")

    def _matches(self, host: bytes) -> bool:
        """Whether a `Host` is known; a client that sends none is no browser. An address cannot be rebound."""
        if not host:
            return True
        if (found := _HOST.fullmatch(host.decode("latin-1").lower())) is None:
            return False
        name = found[1].strip("[]").removesuffix(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return any(fnmatchcase(name, known.lower()) for known in self._hosts)
        return True


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))
