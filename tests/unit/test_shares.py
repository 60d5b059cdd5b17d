"""Whose turn it is in the waiting room."""

from collections import Counter
from collections.abc import Callable

import pytest

from forebay_api.clients.shares import Shares
from forebay_contracts.wire.heartbeats import Used


def shares(**weights: float) -> Shares:
    return Shares(lambda key: weights.get(key or "", 1.0))


def serve(account: Shares, backlog: dict[str | None, int], tokens: Callable[[str | None], int], turns: int) -> Counter:
    used: Counter[str | None] = Counter()
    for number in range(turns):
        key = account.next(backlog)
        account.begin(str(number), key)
        used[key] += tokens(key)
        account.end(Used(request_id=str(number), key=key, tokens=tokens(key)))
    return used


def test_tokens_are_shared_by_weight() -> None:
    used = serve(shares(b=3), {"a": 1000, "b": 1000}, lambda key: 40 if key == "a" else 10, 2000)
    assert used["b"] / used["a"] == pytest.approx(3, rel=0.01)


def test_what_is_out_counts() -> None:
    account = shares()
    picked = []
    for number in range(4):
        picked.append(account.next({"a": 9, "b": 9}))
        account.begin(str(number), picked[-1])
    assert picked == ["a", "b", "a", "b"]


def test_a_key_saves_nothing_up() -> None:
    account = shares()
    serve(account, {"a": 1000}, lambda _: 50, 100)
    used = serve(account, {"a": 1000, "b": 1000}, lambda _: 50, 100)
    assert abs(used["a"] - used["b"]) <= 100


def test_a_key_saves_nothing_up_although_an_attempt_of_it_never_ended() -> None:
    account = shares()
    account.next({"a": 1, "b": 1})
    account.begin("its worker was killed", "a")
    serve(account, {"b": 1000}, lambda _: 50, 100)
    used = serve(account, {"a": 1000, "b": 1000}, lambda _: 50, 100)
    assert abs(used["a"] - used["b"]) <= 200


def test_what_others_have_moved_counts() -> None:
    account = shares()
    account.next({"a": 1, "b": 1})
    account.end(Used(request_id="elsewhere", key="a", tokens=500))
    assert [account.next({"a": 1, "b": 1}) for _ in range(3)] == ["b"] * 3
