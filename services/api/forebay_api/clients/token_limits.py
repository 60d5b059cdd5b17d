"""Limits on the tokens of a key, a minute and a day, from the counters of usage."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from forebay_api.clients.keys import Client
from forebay_contracts.nats import clock
from forebay_contracts.queueing.usage import DAY_S, UsageRow, day_of
from forebay_contracts.wire.errors import DailyTokensSpent, QueueUnavailable, TokenLimitReached

REFRESH_S: Final = 1.0
"""How often the counters are read while keys with such limits ask."""

LINGER_S: Final = 60.0
"""For how long after the last such request."""

MINUTE_S: Final = 60.0


@dataclass(slots=True)
class Account:
    """What a key used on `day`, and of its tokens a minute those that had not come back at `at` (monotonic seconds).

    A request is charged when it has ended. So more may be `out` than the limit, and the key waits until it is back.
    """

    day: str
    used: int
    at: float
    out: float = 0.0

    def charge(self, day: str, used: int, per_minute: int | None) -> None:
        """Take what was `used` on `day`, as it was read now. It may have been used at any time since the last read."""
        self.out += max(used - self.used if day == self.day else used, 0)
        self.out = self.out_now(per_minute)
        self.day, self.used, self.at = day, used, time.monotonic()

    def out_now(self, per_minute: int | None) -> float:
        """The tokens that are out now: `per_minute` come back in a minute, evenly."""
        return max(self.out - (time.monotonic() - self.at) / MINUTE_S * per_minute, 0) if per_minute else 0.0

    def used_today(self) -> int:
        """Tokens since midnight (UTC)."""
        return self.used if self.day == day_of(clock.now()) else 0


class TokenLimits:
    """Refuses the requests of a key that has used its tokens.

    `limited` gives the clients with such limits, and `usage` reads what keys used on some days. It is read once a
    second, so a limit costs a request no round trip. All apis see the same counters, also those that have just started.
    What runs, and what ended since the last read, is not charged yet: so much more may be used, and is paid back.
    """

    def __init__(
        self,
        limited: Callable[[], Iterable[Client]],
        usage: Callable[[Collection[str], Collection[str | None]], Awaitable[list[UsageRow]]],
    ) -> None:
        self._limited = limited
        self._usage = usage
        self._accounts: dict[str | None, Account] = {}
        self._asked_at = -LINGER_S

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Read the counters now, and again as long as the block lasts and keys with limits ask."""
        await self.refresh()
        follower = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            follower.cancel()

    def check(self, client: Client) -> None:
        """Raises TokenLimitReached if a key with limits has used its tokens."""
        if client.tokens_per_minute is None and client.tokens_per_day is None:
            return
        self._asked_at = time.monotonic()
        if (account := self._accounts.get(client.name)) is None:
            return
        if client.tokens_per_day is not None and account.used_today() >= client.tokens_per_day:
            raise DailyTokensSpent(
                f"Your key `{client.name}` has used the {client.tokens_per_day} tokens that it may use in a day (UTC).",
                math.ceil(_until_midnight_s()),
            )
        if (most := client.tokens_per_minute) is not None and (out := account.out_now(most)) >= most:
            raise TokenLimitReached(
                f"Your key `{client.name}` has used the {most} tokens that it may use in a minute.",
                math.ceil((out - most + 1) / most * MINUTE_S),
            )

    def left(self, client: Client) -> tuple[int, int, float] | None:
        """Of the limit of which less is left: the limit, what is left of it, and seconds until all of it is there."""
        account = self._accounts.get(client.name)
        found = []
        if (minute := client.tokens_per_minute) is not None:
            out = account.out_now(minute) if account is not None else 0
            found.append((minute, max(int(minute - out), 0), out / minute * MINUTE_S))
        if (day := client.tokens_per_day) is not None:
            used = account.used_today() if account is not None else 0
            found.append((day, max(day - used, 0), _until_midnight_s()))
        return min(found, key=lambda limit: limit[1], default=None)

    async def refresh(self) -> None:
        """Read the counters of today. Without an answer, what was read before stays."""
        limited = {client.name: client for client in self._limited()}
        if not limited:
            return
        day = day_of(clock.now())
        with contextlib.suppress(QueueUnavailable):
            used = dict.fromkeys(limited, 0)
            for row in await self._usage([day], limited):
                used[row.key] += row.tokens
            for name, tokens in used.items():
                account = self._accounts.setdefault(name, Account(day, tokens, time.monotonic()))
                account.charge(day, tokens, limited[name].tokens_per_minute)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            if time.monotonic() - self._asked_at < LINGER_S:
                await self.refresh()


def _until_midnight_s() -> float:
    return DAY_S - clock.now() % DAY_S
