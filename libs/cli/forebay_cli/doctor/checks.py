"""`forebay doctor`: what is wrong with this deployment as seen from this machine, and what cures it."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from forebay_cli import console
from forebay_cli.connection import Refusals, settings
from forebay_cli.doctor import machine, roles
from forebay_cli.doctor.findings import Finding, size
from forebay_contracts.nats import connection, permissions, presence, topology
from forebay_contracts.nats.connection import Connection, Role
from forebay_contracts.settings import Settings
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, ForebayError, QueueUnavailable
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus

TIMEOUT_S = 3.0
"""How long one question to NATS may take."""

MAX_SKEW_S = 1.0
"""Clocks that are further apart move deadlines by as much."""

FULL_PERCENT = 80

Check = Callable[[Connection, Settings], Awaitable[list[Finding]]]


class _JetStreamOff(ForebayError):
    """There is no JetStream, so there is nothing else to look at."""


async def doctor(*, role: Role, as_json: bool) -> int:
    """Check everything and print what was found; 1 if there is a problem, else 0."""
    read = settings()
    findings = [*await _of_nats(read, role), *await asyncio.to_thread(machine.findings, read)]
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        columns = ("check", "", "found", "fix")
        rows = [(found.check, found.severity, found.message, found.fix) for found in findings]
        console.print_table(console.table("Findings", columns, rows))
    return 1 if any(finding.severity == "problem" for finding in findings) else 0


async def _of_nats(read: Settings, role: Role) -> list[Finding]:
    with Refusals() as refusals:
        try:
            async with connection.connected(read, "forebay doctor", role) as link:
                version = link.client.connected_server_version
                found = [Finding("nats", "ok", f"nats-server {version.major}.{version.minor}.{version.patch} answers")]
                found += await _of_connection(link, read)
        except QueueUnavailable as exc:
            fix = "start it (`forebay up` brings its own), or set NATS_URL to where it is"
            return [Finding("nats", "problem", str(exc), fix)]
        except ConfigurationError as exc:
            return [Finding("nats", "problem", str(exc), _cure(str(exc)))]
    return found + [Finding("permissions", "problem", line, _PERMIT) for line in refusals.told()]


async def _of_connection(link: Connection, read: Settings) -> list[Finding]:
    found = await _checked(_permissions, link, read)
    try:
        found += await _checked(_jetstream, link, read)
    except _JetStreamOff as exc:
        fix = "start nats-server with JetStream (`-js`), and enable it for the account"
        return [*found, Finding("jetstream", "problem", f"JetStream is off: {exc}", fix)]
    # Side by side: what a user may not ask is waited for in vain.
    others = await asyncio.gather(*(_checked(check, link, read) for check in (_topology, _clocks, _models, _services)))
    return found + [finding for findings in others for finding in findings]


async def _checked(check: Check, link: Connection, read: Settings) -> list[Finding]:
    name = check.__name__.strip("_")
    try:
        return await check(link, read)
    except ConfigurationError as exc:
        return [Finding(name, "problem", str(exc), _cure(str(exc)))]
    except (NatsError, TimeoutError, QueueUnavailable) as exc:
        return [Finding(name, "problem", f"NATS did not answer: {exc or type(exc).__name__}", _PERMIT)]


_PERMIT = "look as `operator` or `admin` of deploy/nats/forebay.conf, or allow this user there what it names"

_CURES = {
    "too old": "update nats-server to 2.12 or newer, or set NATS_URL to one that is",
    "refuses this user": "set NATS_NKEY_SEED or NATS_CREDENTIALS to the file of a user that the server knows",
    "NATS_NKEY_SEED": "set NATS_NKEY_SEED to a file with one line that begins with SU",
    "credentials": "set NATS_CREDENTIALS or NATS_NKEY_SEED to a file that is there and may be read",
    "TLS files": "set NATS_TLS_CA, NATS_TLS_CERT and NATS_TLS_KEY to PEM files that may be read",
    "does not speak TLS": "enable TLS on the server, or leave NATS_TLS_CA and NATS_TLS_CERT empty",
    "MODEL_NAME": "set another MODEL_NAME for one of the two models",
}
"""By words of a ConfigurationError of the connection or the topology."""


def _cure(error: str) -> str:
    return next((fix for words, fix in _CURES.items() if words in error), "correct the setting that it names")


async def _permissions(link: Connection, _: Settings) -> list[Finding]:
    own = await permissions.own(link)
    if own is None:
        fix = "as api or inference, give `--role`; else allow it to publish to `$SYS.REQ.USER.INFO`"
        return [Finding("permissions", "warning", "the server does not say what this user may do", fix)]
    missing = {role: roles.missing(own, role) for role in roles.ROLES}
    able = [role for role, lacks in missing.items() if not lacks]
    if able:
        return [Finding("permissions", "ok", f"this user may do what is needed as {', '.join(able)}")]
    role = min(missing, key=lambda role: len(missing[role]) / len(roles.ROLES[role]))
    fix = f"allow it in {role.upper()}_MAY of deploy/nats/forebay.conf, and reload the server"
    return [Finding("permissions", "problem", f"as {role}, this user may not {lack}", fix) for lack in missing[role]]


async def _ask(link: Connection, request: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await link.client.request(f"$JS.API.{request}", b"", timeout=TIMEOUT_S)).data)
    return answer


async def _jetstream(link: Connection, _: Settings) -> list[Finding]:
    try:
        info = await _ask(link, "INFO")
    except NoRespondersError:
        raise _JetStreamOff("the server has none") from None
    if "error" in info:
        raise _JetStreamOff(info["error"].get("description"))
    used, most = info["storage"], info["limits"]["max_storage"]
    if most > 0 and used * 100 >= most * FULL_PERCENT:
        message = f"{used * 100 // most} % of the account's storage of {size(most)} is used"
        return [Finding("jetstream", "warning", message, "raise the account's max_storage, or lower MAX_QUEUE_SIZE")]
    limit = "without a limit" if most <= 0 else f"of {size(most)}"
    return [Finding("jetstream", "ok", f"{size(used)} of storage used, {limit}")]


async def _topology(link: Connection, read: Settings) -> list[Finding]:
    fix = "`forebay topology apply` makes it what the settings here say; or set here what the services have"
    drifted = await topology.drift(link, read, read.served_model)
    if not drifted:
        return [Finding("topology", "ok", "streams, buckets and consumer are what the settings say")]
    return [Finding("topology", "warning", drift, fix) for drift in drifted]


async def _clocks(link: Connection, _: Settings) -> list[Finding]:
    before = time.time()
    info = await _ask(link, f"STREAM.INFO.{names.STREAM}")
    if "ts" not in info:
        return []
    skew_s = datetime.fromisoformat(info["ts"]).timestamp() - (before + time.time()) / 2
    found = [_skew("the clock of NATS", "this machine's", skew_s)]
    for bucket, kind in ((names.WORKERS_BUCKET, WorkerInfo), (names.APIS_BUCKET, ApiInfo)):
        stream, prefix = names.bucket_stream(bucket), names.bucket_subjects(bucket).removesuffix(">")
        for service in await _alive(link, bucket, kind):
            try:
                stored = await link.jetstream.get_last_msg(stream, prefix + service.id, direct=True)
            except NotFoundError:
                continue
            # The server notes when it took the heartbeat, its sender when it was written.
            if stored.time is not None and stored.data:
                beat = kind.model_validate_json(stored.data).heartbeat_at
                taken = stored.time if stored.time.tzinfo else stored.time.replace(tzinfo=UTC)
                found.append(_skew(f"the clock of {service.id}", "that of NATS", beat - taken.timestamp()))
    wrong = [finding for finding in found if finding.severity != "ok"]
    return wrong or [Finding("clocks", "ok", f"all {len(found) + 1} agree within {MAX_SKEW_S:g} s")]


def _skew(clock: str, other: str, skew_s: float) -> Finding:
    way = "ahead of" if skew_s > 0 else "behind"
    if abs(skew_s) <= MAX_SKEW_S:
        return Finding("clocks", "ok", f"{clock} agrees with {other}")
    message = f"{clock} is {abs(skew_s):.1f} s {way} {other}: deadlines come that much too early or late"
    return Finding("clocks", "problem", message, "synchronise both by NTP (chrony, systemd-timesyncd)")


async def _models(link: Connection, read: Settings) -> list[Finding]:
    try:
        consumers = await topology.consumers(link)
    except NotFoundError:
        return []
    workers = await _alive(link, names.WORKERS_BUCKET, WorkerInfo)
    return [finding for consumer in consumers for finding in _model(consumer, workers, read)]


def _model(consumer: ConsumerInfo, workers: list[WorkerInfo], read: Settings) -> Iterator[Finding]:
    model = (consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name)
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
        fix = "wait for it; `forebay status --watch` shows how far it is"
        yield Finding("models", "warning", f"{model}: its workers are not ready ({doing}); {waiting} wait", fix)
    elif waiting or consumer.num_ack_pending or model == read.served_model or not workers:
        fix = "start one (`forebay inference`, or `forebay up`); its log says why it ended"
        yield Finding("models", "problem", f"{model} has no worker; {waiting} wait", fix)
    else:
        # Others are served and nobody asks for this one: it may have been retired.
        fix = f"start a worker, or forget it: `nats consumer rm {names.STREAM} {consumer.name}`"
        yield Finding("models", "warning", f"{model} has no worker; 0 wait", fix)


async def _services(link: Connection, _: Settings) -> list[Finding]:
    apis = await _alive(link, names.APIS_BUCKET, ApiInfo)
    workers = await _alive(link, names.WORKERS_BUCKET, WorkerInfo)
    found = [Finding("services", "ok", f"{len(apis)} api, {len(workers)} worker processes are alive")]
    if not apis:
        found = [Finding("services", "problem", "no api is alive", "start one: `forebay api`, or `forebay up`")]
    others = sorted({service.version for service in (*apis, *workers)} - {VERSION})
    if others:
        message = f"this is version {VERSION}, and of version {', '.join(others)} some services are"
        found.append(Finding("services", "warning", message, "finish the update: restart what is of the old version"))
    return found


async def _alive(link: Connection, bucket: str, kind: Any) -> list[Any]:
    try:
        return await presence.read(link, bucket, kind)
    except NotFoundError:
        return []
