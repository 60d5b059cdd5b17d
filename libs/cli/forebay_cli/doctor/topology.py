"""Whether streams, buckets and the model's consumer match the settings."""

from forebay_cli.doctor.findings import Finding
from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings


async def check(link: Connection, read: Settings) -> list[Finding]:
    """A warning for each difference."""
    fix = "`forebay topology apply` applies the settings here; or set here what the services have"
    drifted = await topology.drift(link, read, read.served_model)
    if not drifted:
        return [Finding("topology", "ok", "streams, buckets and consumer match the settings")]
    return [Finding("topology", "warning", drift, fix) for drift in drifted]
