"""Whether streams, buckets and the model's consumer match the settings, and the services were told the same limits."""

from forebay_cli.doctor.findings import Finding
from forebay_contracts.nats import limits, presence, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers, model_of
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo


async def check(link: Connection, read: Settings) -> list[Finding]:
    """A warning for each difference."""
    fix = "`forebay topology apply` applies the settings here; or set here what the services have"
    drifted = await topology.drift(link, read, read.served_model)
    stays = (await topology.live_limits(link, read, read.served_model)).default_differences()
    found = [Finding("topology", "warning", drift, fix) for drift in drifted]
    found += [Finding("topology", "warning", one, "none, if the services set it; else set it there") for one in stays]
    return found or [Finding("topology", "ok", "streams, buckets and consumer match the settings")]


async def check_limits(link: Connection, read: Settings) -> list[Finding]:
    """A warning for each limit that the services were told differently."""
    workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    apis = await presence.read(link, names.APIS_BUCKET, ApiInfo)
    of_models = {model_of(one): limits.read({}, one.config) for one in await consumers(link)}
    live = (await topology.live_limits(link, read, read.served_model)).live
    differences = limits.differences(live, of_models, [*workers, *apis])
    fix = "set one value in the environment of all services, and restart those that have another"
    found = [Finding("limits", "warning", one, fix) for one in differences]
    return found or [Finding("limits", "ok", "the services agree on the shared limits")]
