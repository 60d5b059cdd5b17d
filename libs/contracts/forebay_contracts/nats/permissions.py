"""What the user of a connection may publish and subscribe to, as the server says it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from nats.errors import Error as NatsError

from forebay_contracts.nats.connection import Connection

TIMEOUT_S = 2.0

_SUBJECT = "$SYS.REQ.USER.INFO"


@dataclass(frozen=True, slots=True)
class Subjects:
    """Subject patterns that are allowed (None: all) and denied. A denial wins."""

    allow: Sequence[str] | None = None
    deny: Sequence[str] = ()

    def permit(self, subject: str) -> bool:
        """Whether all of `subject` is allowed; it may hold wildcards."""
        allowed = self.allow is None or any(covers(pattern, subject) for pattern in self.allow)
        return allowed and not any(covers(pattern, subject) for pattern in self.deny)


@dataclass(frozen=True, slots=True)
class Permissions:
    """The permissions of one user. Without authentication there is no user, and everything is allowed."""

    user: str = ""
    publish: Subjects = Subjects()
    subscribe: Subjects = Subjects()


async def own(connection: Connection) -> Permissions | None:
    """What the connection's user may do; None if the server does not answer, as for a user that may not ask."""
    try:
        answer = await connection.client.request(_SUBJECT, b"", timeout=TIMEOUT_S)
    except (NatsError, TimeoutError):
        return None
    found = json.loads(answer.data).get("data") or {}
    given = found.get("permissions") or {}
    return Permissions(found.get("user", ""), _subjects(given.get("publish")), _subjects(given.get("subscribe")))


def covers(pattern: str, subject: str) -> bool:
    """Whether `pattern` matches every subject that `subject` matches."""
    wanted, given = subject.split("."), pattern.split(".")
    for position, token in enumerate(given):
        if token == ">":
            return len(wanted) > position
        if position >= len(wanted) or wanted[position] == ">" or token not in ("*", wanted[position]):
            return False
    return len(wanted) == len(given)


def _subjects(given: dict[str, list[str]] | None) -> Subjects:
    if not given:
        return Subjects()
    return Subjects(given.get("allow"), given.get("deny") or ())
