"""Whether the server has JetStream, and how much of the account's storage is used."""

import json
from typing import Any

from nats.errors import NoRespondersError

from forebay_cli.doctor.findings import Finding, size
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings
from forebay_contracts.wire.errors import ForebayError

TIMEOUT_S = 3.0
"""The longest wait for an answer of JetStream."""

FULL_PERCENT = 80


class JetStreamOff(ForebayError):
    """There is no JetStream, and so nothing that the later checks could read."""


async def ask(link: Connection, request: str) -> dict[str, Any]:
    """JetStream's answer to `$JS.API.<request>` as it is sent: nats-py drops fields such as the server's time."""
    answer: dict[str, Any] = json.loads((await link.client.request(f"$JS.API.{request}", b"", timeout=TIMEOUT_S)).data)
    return answer


async def check(link: Connection, settings: Settings) -> list[Finding]:
    """The storage used.

    Raises:
        JetStreamOff: it is off, for the server or the account.
    """
    try:
        info = await ask(link, "INFO")
    except NoRespondersError:
        raise JetStreamOff("the server has none") from None
    if "error" in info:
        raise JetStreamOff(info["error"].get("description"))
    # Some accounts have limits by the number of replicas.
    limited = (info.get("tiers") or {}).get(f"R{settings.nats_replicas}", info)
    used, most = limited["storage"], limited["limits"]["max_storage"]
    if most > 0 and used * 100 >= most * FULL_PERCENT:
        message = f"{used * 100 // most} % of the account's storage of {size(most)} is used"
        return [Finding("jetstream", "warning", message, "raise the account's max_storage, or lower MAX_QUEUE_SIZE")]
    limit = "without a limit" if most <= 0 else f"of {size(most)}"
    return [Finding("jetstream", "ok", f"{size(used)} of storage used, {limit}")]
