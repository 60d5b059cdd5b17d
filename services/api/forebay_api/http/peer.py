"""The client at the other end of a connection, and who wants to know that it has left."""

from collections.abc import Callable
from typing import Final, Self

from starlette.types import Scope

_EXTENSION: Final = "forebay.peer"


class Peer:
    """`left` says whether the client has left. `watch` names a function that is called once it leaves.

    ASGI tells it only to a task that waits in `receive`: for each request one more task, which costs 2 KB and 4 % of
    the api's CPU time for a short answer.
    """

    __slots__ = ("_watching", "left")

    def __init__(self) -> None:
        self.left = False
        self._watching: list[Callable[[], None]] = []

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """The client of a request. One of another server than ours never leaves."""
        peer = scope.get("extensions", {}).get(_EXTENSION)
        return peer if isinstance(peer, cls) else cls()

    def extend(self, scope: Scope) -> None:
        """Make it the client of the request with `scope`."""
        scope["extensions"] = {_EXTENSION: self}

    def watch(self, tell: Callable[[], None]) -> None:
        """Call `tell` when the client leaves, or now if it has left."""
        if self.left:
            tell()
        else:
            self._watching.append(tell)

    def forget(self, tell: Callable[[], None]) -> None:
        """Call `tell` no more."""
        if tell in self._watching:
            self._watching.remove(tell)

    def leave(self) -> None:
        """The client has left."""
        self.left, watching = True, self._watching
        self._watching = []
        for tell in watching:
            tell()
