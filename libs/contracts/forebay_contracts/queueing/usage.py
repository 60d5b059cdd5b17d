"""What each key used of each model, a day: the counters of the stream INFERENCE_USAGE.

A counter (NATS ADR-49) is one integer without an upper bound. FIELDS are groups of its decimal digits, so one message
adds to all of them. Its increment is a function of the final state of a request. So whoever counts the state again
counts the same.
"""

import functools
import time
from collections.abc import Collection, Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict

from forebay_contracts.nats import clock
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestState, Usage

FIELDS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "queue_ms")
"""The groups of digits, the first one on the left. All but the first have DIGITS digits."""

DIGITS: Final = 15

MOST: Final = 10**9
"""Most that one request adds to a field. Other servers (INFERENCE_ENGINE=openai) say what they used, and may err."""

DAY_S: Final = 86_400

_BASE: Final = 10**DIGITS

_NOTHING: Final = Usage()


class UsageRow(BaseModel):
    """What was used: of one model on one day (UTC) by one key, `key` None: without. A sum leaves out what it sums over.

    `requests` are those that have ended, however they ended. `queue_seconds` is their wait for their first attempt.
    """

    model_config = ConfigDict(frozen=True)

    day: str | None = None
    model: str | None = None
    key: str | None = None
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens in and out."""
        return self.prompt_tokens + self.completion_tokens


def day_of(at: float) -> str:
    """The day (UTC) of a time in seconds since the epoch, as `2026-11-30`."""
    return _day(int(at // DAY_S))


@functools.lru_cache(16)
def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(number * DAY_S))


def last_days(days: int) -> list[str]:
    """Today, by the clock of NATS, and the days before it: so many in all, the oldest first."""
    now = clock.now()
    return [day_of(now - ago * DAY_S) for ago in reversed(range(days))]


def counter_of(state: RequestState) -> str:
    """The counter to which a request in this final state belongs. Its day is the one on which it ended."""
    return names.usage_subject(day_of(state.finished_at or state.queued_at), state.model, state.key)


def value_of(state: RequestState) -> int:
    """What a request in this final state adds to its counter."""
    usage = state.usage or _NOTHING
    waited_s = (state.started_at or state.finished_at or state.queued_at) - state.queued_at
    value = 1
    for count in (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, int(waited_s * 1000)):
        value = value * _BASE + (count if 0 <= count <= MOST else min(max(count, 0), MOST))
    return value


def used_of(counter: str, value: int) -> UsageRow:
    """What the counter on the subject `counter` says."""
    counts = []
    for _ in FIELDS:
        value, count = divmod(value, _BASE)
        counts.append(count)
    queue_ms, completion, cached, prompt, requests = counts
    day, model, key = names.usage_of(counter)
    return UsageRow(
        day=day,
        model=model,
        key=key,
        requests=requests,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        queue_seconds=queue_ms / 1000,
    )


def total(rows: Iterable[UsageRow], **group: str | None) -> UsageRow:
    """The sum of `rows`, under the names of `group`."""
    rows = list(rows)
    return UsageRow(
        **group,
        requests=sum(row.requests for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        completion_tokens=sum(row.completion_tokens for row in rows),
        queue_seconds=round(sum(row.queue_seconds for row in rows), 3),
    )


def grouped(rows: Iterable[UsageRow], by: Collection[str]) -> list[UsageRow]:
    """`rows` summed over what is not named in `by` (of day, model and key), in the order of `by`."""
    groups: dict[tuple[str | None, ...], list[UsageRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in by), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: [name or "" for name in group[0]])
    return [total(some, **dict(zip(by, values, strict=True))) for values, some in ordered]
