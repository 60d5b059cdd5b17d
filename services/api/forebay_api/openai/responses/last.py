"""The last response of a connection, which a next one on it may go on from although it is not stored."""

from collections.abc import Sequence
from typing import Any

from forebay_api.openai.responses.format import ResponseFormat

_Items = Sequence[dict[str, Any]]


class Last:
    """Holds one response, in memory and for as long as its connection lasts."""

    def __init__(self) -> None:
        self._asked: _Items = ()
        self._answer: ResponseFormat | None = None

    def keep(self, asked: _Items, answer: ResponseFormat) -> None:
        """Hold a response that begins: the items that it answers, and its answer."""
        self._asked, self._answer = asked, answer

    def take(self, identifier: str | None) -> list[dict[str, Any]] | None:
        """The items up to the end of the response of this id; None if it is not held, or has failed.

        It is held no more: either the next response takes its place, or that one fails.
        """
        if identifier is None or self._answer is None:
            return None
        response = self._answer.response()
        if response["id"] != identifier:
            return None
        asked, self._asked, self._answer = self._asked, (), None
        return [*asked, *response["output"]] if response["status"] in ("completed", "incomplete") else None
