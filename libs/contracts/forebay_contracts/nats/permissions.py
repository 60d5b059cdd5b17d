"""What the user of a connection may publish and hear, as the server itself says it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from nats.errors import Error as NatsError

from forebay_contracts.nats.connection import Connection

TIMEOUT_S = 2.0

_SUBJECT = "$SYS.REQ.USER.INFO"


@dataclass(frozen=True, slots=True)
class Subjects:
    """Patterns that are allowed (None: all that is not denied) and denied."""

    allow: Sequence[str] | None = None
    deny: Sequence[str] = ()

    def permit(self, subject: str) -> bool:
        """Whether all of `subject`, which may hold wildcards, is allowed."""
        allowed = self.allow is None or any(covers(pattern, subject) for pattern in self.allow)
        return allowed and not any(covers(pattern, subject) for pattern in self.deny)


@dataclass(frozen=True, slots=True)
class Permissions:
    """Of one user; without a user (no authentication) everything is allowed."""

    user: str = ""
    publish: Subjects = Subjects()
    subscribe: Subjects = Subjects()


async def own(connection: Connection) -> Permissions | None:
    """What the connection's user may do; None where the server does not say, as for one that may not ask."""
    try:
        answer = await connection.client.request(_SUBJECT, b"", timeout=TIMEOUT_S)
    except (NatsError, TimeoutError):
        return None
    found = json.loads(answer.data).get("data") or {}
    given = found.get("permissions") or {}
    return Permissions(found.get("user", ""), _subjects(given.get("publish")), _subjects(given.get("subscribe")))


def covers(pattern: str, subject: str) -> bool:
    """Whether every subject that `subject` stands for is one that `pattern` stands for."""
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
