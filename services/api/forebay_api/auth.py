"""API keys: `Authorization: Bearer`, compared in constant time."""

import hmac
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.requests import Request

from forebay_contracts.errors import InvalidApiKey


class ApiKeys:
    """Who may come in; with no keys configured, everybody."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._keys = [key.get_secret_value().encode() for key in keys]

    def check(self, request: Request) -> None:
        """Raises InvalidApiKey unless the request carries one of the keys."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise InvalidApiKey("You didn't provide an API key: send it as `Authorization: Bearer YOUR_KEY`.")
        # Every key is compared, so that the time taken says nothing about which one matched.
        sent = given.strip().encode("latin-1")  # the bytes as they came: header values are decoded so
        matches = [hmac.compare_digest(key, sent) for key in self._keys]
        if not any(matches):
            raise InvalidApiKey("Incorrect API key provided.")
