"""Whether the clocks of this machine, of NATS and of the services agree. Deadlines go by the clock of NATS alone."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from nats.js.errors import NotFoundError

from forebay_cli.doctor.findings import Finding
from forebay_cli.doctor.jetstream import ask
from forebay_contracts.nats import presence
from forebay_contracts.nats.clock import MAX_SKEW_S
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo


async def check(link: Connection, _: Settings) -> list[Finding]:
    """A warning for each clock that is wrong by more than MAX_SKEW_S."""
    before = time.time()
    info = await ask(link, f"STREAM.INFO.{names.STREAM}")
    if "ts" not in info:
        return []
    of_nats = datetime.fromisoformat(info["ts"]).timestamp() - (before + time.time()) / 2
    skews = [("the clock of NATS", "this machine's", of_nats)]
    skews += [(f"the clock of {service}", "that of NATS", skew_s) async for service, skew_s in _skews(link)]
    wrong = [_warning(*skew) for skew in skews if abs(skew[2]) > MAX_SKEW_S]
    return wrong or [Finding("clocks", "ok", f"all {len(skews) + 1} agree within {MAX_SKEW_S:g} s")]


async def _skews(link: Connection) -> AsyncIterator[tuple[str, float]]:
    """Each service, and by how many seconds its clock is ahead of that of NATS."""
    kinds: dict[str, Any] = {names.WORKERS_BUCKET: WorkerInfo, names.APIS_BUCKET: ApiInfo}
    for bucket, kind in kinds.items():
        prefix = names.bucket_subjects(bucket).removesuffix(">")
        for service in await presence.read(link, bucket, kind):
            try:
                stored = await link.jetstream.get_last_msg(
                    names.bucket_stream(bucket), prefix + service.id, direct=True
                )
            except NotFoundError:
                continue
            if stored.time is not None and stored.data:
                # The service says when it wrote the heartbeat, the server when it stored it.
                stored_at = stored.time if stored.time.tzinfo else stored.time.replace(tzinfo=UTC)
                yield service.id, kind.model_validate_json(stored.data).heartbeat_at - stored_at.timestamp()


def _warning(clock: str, other: str, skew_s: float) -> Finding:
    way = "ahead of" if skew_s > 0 else "behind"
    message = f"{clock} is {abs(skew_s):.1f} s {way} {other}: the times of its log lines are off"
    return Finding("clocks", "warning", message, "synchronise both by NTP (chrony, systemd-timesyncd)")
