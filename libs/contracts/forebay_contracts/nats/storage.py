"""How the streams share what an account may store."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from nats.js.api import AccountLimits, StreamConfig

from forebay_contracts.nats import permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import stream_configs
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names

UNLIMITED_BYTES: Final = 10 << 30
"""What is shared where an account has no limit, and wants one on each stream."""

_WEIGHTS: Final = {
    # What stored responses were asked for, and a state of each request.
    names.bucket_stream(names.RESPONSES_BUCKET): 4,
    names.bucket_stream(names.REQUESTS_BUCKET): 2,
}
_USED: Final = 0.95
"""The part of what is left over that streams without a bound of their own share. The server counts more than bodies."""


async def wanted_streams(connection: Connection, settings: Settings) -> list[StreamConfig]:
    """All streams as `settings` want them, with bounds that the account admits.

    For a user that may not ask for the account's limits, bounds in bytes stay as they are.
    """
    allowed = await permissions.own(connection)
    if allowed is not None and not allowed.publish.permit("$JS.API.INFO"):
        return stream_configs(settings, None)
    info = await connection.jetstream.account_info()
    tier = (info.tiers or {}).get(f"R{settings.nats_replicas}")
    limits: AccountLimits = info.limits if tier is None else tier.limits
    # The server counts each replica, but for tiers.
    copies = settings.nats_replicas if tier is None else 1
    storage = limits.max_storage // copies if limits.max_storage > 0 else math.inf
    if limits.max_bytes_required:
        storage = min(storage, UNLIMITED_BYTES)
        configs = bounded(stream_configs(settings, storage), storage)
    else:
        configs = stream_configs(settings, storage)
    most = limits.storage_max_stream_bytes or 0
    return [replace(one, max_bytes=min(one.max_bytes, most)) if one.max_bytes and most > 0 else one for one in configs]


def bounded(configs: Sequence[StreamConfig], storage: float) -> list[StreamConfig]:
    """`configs` with a bound in bytes for each, as some accounts want it (Synadia Cloud): together within `storage`."""
    left = storage - sum(config.max_bytes or 0 for config in configs)
    weights = {config.name: _WEIGHTS.get(config.name or "", 1) for config in configs if not config.max_bytes}
    unit = left * _USED / max(1, sum(weights.values()))
    return [
        config if config.max_bytes else replace(config, max_bytes=int(unit * weights[config.name]))
        for config in configs
    ]
