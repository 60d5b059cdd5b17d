"""What an entry of API_KEYS_FILE says of tiers and bounds, and what a key has beyond its bound."""

import contextlib
from pathlib import Path

import pytest

from forebay_api.clients.keys import ApiKeys
from forebay_api.clients.limits import KeyLimits
from forebay_api.clients.token_limits import TokenLimits
from forebay_contracts.queueing.memory import InMemoryStateStore
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import ConfigurationError, KeyLimitReached, TierNotAllowed
from forebay_contracts.wire.request import Tier
from support.twins import request

UNLIMITED = TokenLimits(list, InMemoryStateStore().usage)


def keys_of(tmp_path: Path, fields: str) -> ApiKeys:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nsha256 = "{"0" * 64}"\n{fields}\n')
    found = ApiKeys(ApiSettings(api_keys_file=file, _env_file=None))
    found._take(file.read_text())
    return found


def test_what_a_key_has_beyond_its_bound_is_deferred(tmp_path: Path) -> None:
    limits = KeyLimits(keys_of(tmp_path, "max_requests = 1"), list, UNLIMITED, defers=True)
    with limits.one_more(request(key="alice")) as first, limits.one_more(request(key="alice")) as second:
        assert (first.tier, second.tier) == (Tier.DEFAULT, Tier.OVERFLOW)
        assert (first.deferred, second.deferred) == (False, True)
        assert second.service_tier == "default"
        assert limits.unfinished == {"alice": 1}
        with limits.one_more(request(tier=Tier.FLEX, key="alice")) as third:
            assert third.tier is Tier.FLEX
    assert limits.unfinished == {}
    refusing = KeyLimits(keys_of(tmp_path, "max_requests = 1"), list, UNLIMITED)
    with refusing.one_more(request(key="alice")), pytest.raises(KeyLimitReached):
        refusing.one_more(request(key="alice")).__enter__()


def test_headers_tell_when_the_requests_of_a_key_should_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, now = keys_of(tmp_path, "max_requests = 2"), 1000.0
    monkeypatch.setattr("forebay_api.clients.limits.time.monotonic", lambda: now)
    limits, alice = KeyLimits(keys, list, UNLIMITED), keys.of("alice")
    assert alice is not None

    def told() -> dict[str, str]:
        names = {b"x-ratelimit-remaining-requests": "remaining", b"x-ratelimit-reset-requests": "reset"}
        return {names[name]: value.decode() for name, value in limits.headers(alice) if name in names}

    assert told() == {"remaining": "2", "reset": "0ms"}
    with limits.one_more(request(key="alice")):
        assert told() == {"remaining": "1"}  # nothing is known of how long it takes
        now += 90
    with limits.one_more(request(key="alice")), limits.one_more(request(key="alice")):
        assert told() == {"remaining": "0", "reset": "1m30s"}
        with pytest.raises(KeyLimitReached) as refused, limits.one_more(request(key="alice")):
            pass
        assert refused.value.retry_after_s == 45
    assert told() == {"remaining": "2", "reset": "0ms"}


@pytest.mark.parametrize(
    ("fields", "asked", "tier"),
    [
        ("", None, Tier.DEFAULT),
        ("", "priority", Tier.DEFAULT),
        ("", "flex", Tier.FLEX),
        ('tiers = ["flex"]', "auto", Tier.FLEX),
        ('tiers = ["flex"]', "default", None),
        ('tiers = ["default"]', "flex", None),
    ],
)
def test_the_tiers_of_a_key(tmp_path: Path, fields: str, asked: str | None, tier: Tier | None) -> None:
    client = keys_of(tmp_path, fields).of("alice")
    assert client is not None
    with contextlib.nullcontext() if tier else pytest.raises(TierNotAllowed):
        assert client.tier(asked) is tier


@pytest.mark.parametrize(
    "fields", ["weight = 0", "weight = 1e-300", "weight = nan", "tiers = []", 'tiers = ["overflow"]', 'weight = "3"']
)
def test_an_entry_that_cannot_be_meant(tmp_path: Path, fields: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{fields.split()[0]}"):
        keys_of(tmp_path, fields)
