"""Limits on a key's tokens, a minute and a day, and what headers say of them."""

from collections.abc import Collection

import pytest

from forebay_api.clients import limit_headers, token_limits
from forebay_api.clients.keys import Client
from forebay_api.clients.token_limits import TokenLimits
from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.wire.errors import DailyTokensSpent, QueueUnavailable, TokenLimitReached

ALICE = Client("alice", tokens_per_minute=600)
BOB = Client("bob", tokens_per_day=1_000)
NOON = 1_796_040_000.0  # 2026-11-30T12:00:00Z


class Counters:
    """The counters of usage, and the clocks: `now` is both of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.used, self.away = NOON, dict[tuple[str, str], int](), False
        monkeypatch.setattr(token_limits.clock, "now", lambda: self.now)
        monkeypatch.setattr(token_limits.time, "monotonic", lambda: self.now)
        self.limits = TokenLimits(lambda: [ALICE, BOB], self.usage)

    async def usage(self, days: Collection[str], keys: Collection[str | None] | None) -> list[UsageRow]:
        if self.away:
            raise QueueUnavailable("NATS did not answer")
        assert set(keys or ()) == {"alice", "bob"}
        return [
            UsageRow(day=day, model=model, key=key, prompt_tokens=tokens // 2, completion_tokens=tokens - tokens // 2)
            for (day, key), tokens in self.used.items()
            for model in ("m",)
            if day in days
        ]

    async def uses(self, key: str, tokens: int, day: str = "2026-11-30") -> None:
        self.used[day, key] = self.used.get((day, key), 0) + tokens
        await self.limits.refresh()


@pytest.fixture
async def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    made = Counters(monkeypatch)
    # What was used before an api starts is no part of its minute.
    await made.uses("alice", 5_000)
    return made


async def test_the_tokens_of_a_minute_come_back_evenly(counters: Counters) -> None:
    counters.limits.check(ALICE)
    await counters.uses("alice", 599)
    counters.limits.check(ALICE)
    assert counters.limits.left(ALICE) == (600, 1, pytest.approx(59.9))
    await counters.uses("alice", 1)
    with pytest.raises(TokenLimitReached, match="600 tokens that it may use in a minute") as told:
        counters.limits.check(ALICE)
    assert (told.value.status, told.value.type, told.value.code) == (429, "tokens", "rate_limit_exceeded")
    assert told.value.retry_after_s == 1
    counters.now += 0.2
    counters.limits.check(ALICE)
    assert counters.limits.left(ALICE) == (600, 2, pytest.approx(59.8))
    counters.now += 3600
    assert counters.limits.left(ALICE) == (600, 600, 0)


async def test_what_was_used_too_much_is_paid_back(counters: Counters) -> None:
    await counters.uses("alice", 1_200)
    with pytest.raises(TokenLimitReached) as told:
        counters.limits.check(ALICE)
    assert told.value.retry_after_s == 61
    counters.now += 60
    with pytest.raises(TokenLimitReached):
        counters.limits.check(ALICE)
    counters.now += 1
    counters.limits.check(ALICE)


async def test_what_was_used_elsewhere_is_not_taken_for_used_now(counters: Counters) -> None:
    """This api had nothing to read for an hour, while the key used less than its limit by another one."""
    counters.now += 3600
    await counters.uses("alice", 30_000)
    counters.limits.check(ALICE)
    await counters.uses("alice", 600)
    with pytest.raises(TokenLimitReached):
        counters.limits.check(ALICE)


async def test_a_day_ends_at_midnight(counters: Counters) -> None:
    await counters.uses("bob", 999)
    counters.limits.check(BOB)
    assert counters.limits.left(BOB) == (1_000, 1, 12 * 3600)
    await counters.uses("bob", 5)
    with pytest.raises(DailyTokensSpent, match="in a day") as told:
        counters.limits.check(BOB)
    assert told.value.retry_after_s == 12 * 3600
    # An api that starts knows it too.
    new = TokenLimits(lambda: [ALICE, BOB], counters.usage)
    async with new.followed():
        with pytest.raises(DailyTokensSpent):
            new.check(BOB)
    counters.now += 12 * 3600
    counters.limits.check(BOB)
    await counters.uses("bob", 400, "2026-12-01")
    assert counters.limits.left(BOB) == (1_000, 600, 24 * 3600)


async def test_the_tighter_limit_is_told(counters: Counters) -> None:
    both = Client("bob", tokens_per_minute=10_000, tokens_per_day=1_000)
    assert counters.limits.left(both) == (1_000, 1_000, 12 * 3600)
    assert counters.limits.left(Client("carol")) is None


async def test_without_an_answer_what_was_read_stays(counters: Counters) -> None:
    await counters.uses("bob", 1_000)
    counters.away = True
    await counters.limits.refresh()
    with pytest.raises(DailyTokensSpent):
        counters.limits.check(BOB)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0175, "17ms"), (1, "1s"), (60, "1m0s"), (360, "6m0s"), (25_923, "7h12m3s"), (86_400, "24h0m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert limit_headers.duration(seconds) == text
