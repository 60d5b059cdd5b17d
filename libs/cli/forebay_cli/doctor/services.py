"""Whether each model has a worker that is ready, and whether apis are alive and of this version."""

from collections.abc import Iterator

from nats.js.api import ConsumerInfo

from forebay_cli.doctor.findings import Finding
from forebay_contracts.nats import presence
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers, model_of
from forebay_contracts.settings import Settings
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus


async def check_models(link: Connection, read: Settings) -> list[Finding]:
    """What serves each model, and how many requests wait for it."""
    lines = await consumers(link)
    workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    return [finding for line in lines for finding in _of_model(line, workers, read)]


def _of_model(consumer: ConsumerInfo, workers: list[WorkerInfo], read: Settings) -> Iterator[Finding]:
    model = model_of(consumer)
    serving = [worker for worker in workers if worker.model == model]
    ready = sum(worker.status is WorkerStatus.READY for worker in serving)
    waiting = consumer.num_pending or 0
    if consumer.paused:
        message = f"{model} is paused until {consumer.config.pause_until}; {waiting} wait"
        yield Finding("models", "warning", message, f"`forebay resume {model}`")
    if ready:
        yield Finding("models", "ok", f"{model}: {ready} ready, {waiting} wait")
    elif serving:
        doing = ", ".join(sorted({worker.progress or worker.status.value for worker in serving}))
        fix = "wait for it; `forebay status --watch` shows its progress"
        yield Finding("models", "warning", f"{model}: its workers are not ready ({doing}); {waiting} wait", fix)
    elif waiting or consumer.num_ack_pending or model == read.served_model or not workers:
        fix = "start one (`forebay inference`, or `forebay up`); its log says why it ended"
        yield Finding("models", "problem", f"{model} has no worker; {waiting} wait", fix)
    else:
        # Others are served and nobody waits for this one: it may be retired.
        fix = f"start a worker, or remove it: `nats consumer rm {names.STREAM} {consumer.name}`"
        yield Finding("models", "warning", f"{model} has no worker; 0 wait", fix)


async def check_services(link: Connection, _: Settings) -> list[Finding]:
    """How many services are alive, and which versions they have."""
    apis = await presence.read(link, names.APIS_BUCKET, ApiInfo)
    workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    found = [Finding("services", "ok", f"{len(apis)} api, {len(workers)} worker processes are alive")]
    if not apis:
        found = [Finding("services", "problem", "no api is alive", "start one: `forebay api`, or `forebay up`")]
    others = sorted({service.version for service in (*apis, *workers)} - {VERSION})
    if others:
        message = f"this is version {VERSION}, some services are of version {', '.join(others)}"
        found.append(Finding("services", "warning", message, "finish the update: restart the services of the others"))
    return found
