"""`forebay doctor`: what is wrong with this deployment as seen from this machine, and what cures it."""

import asyncio
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from forebay_cli import console
from forebay_cli.links import connected, settings
from forebay_contracts import names, permissions, presence, topology
from forebay_contracts.connection import Connection, Role
from forebay_contracts.errors import QueueUnavailable
from forebay_contracts.messages import ApiInfo, WorkerInfo, WorkerStatus
from forebay_contracts.settings import Settings
from forebay_contracts.version import VERSION

TIMEOUT_S = 3.0
"""How long one question to NATS may take."""

MAX_SKEW_S = 1.0
"""Clocks that are further apart move deadlines by as much."""

FULL_PERCENT = 80
LOW_DISK_BYTES = 5 * 2**30
TOO_LOW_DISK_BYTES = 2**30

MANIFEST = "SHA256SUMS"
"""In the folder of a converted model: its files' checksums, as `sha256sum` writes them."""

Severity = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found; `fix` says what to do about it."""

    check: str
    severity: Severity
    message: str
    fix: str = ""


async def doctor(*, role: Role, as_json: bool) -> int:
    """Check everything and print what was found; 1 if there is a problem, else 0."""
    read = settings()
    findings = [*await _of_nats(read, role), *await asyncio.to_thread(_of_machine, read)]
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        columns = ("check", "", "found", "fix")
        rows = [(found.check, found.severity, found.message, found.fix) for found in findings]
        console.print_table(console.table("Findings", columns, rows))
    return 1 if any(finding.severity == "problem" for finding in findings) else 0


async def _of_nats(read: Settings, role: Role) -> list[Finding]:
    with _Heard() as heard:
        try:
            async with connected(read, role) as link:
                version = link.client.connected_server_version
                found = [Finding("nats", "ok", f"nats-server {version.major}.{version.minor}.{version.patch} answers")]
                checks = (_permissions, _jetstream, _topology, _clocks, _models, _services)
                for check in checks:
                    try:
                        found += await check(link, read)
                    except (NatsError, TimeoutError, QueueUnavailable) as exc:
                        message = f"NATS did not answer: {exc or type(exc).__name__}"
                        found.append(Finding(check.__name__.strip("_"), "problem", message, _PERMIT))
                return found + [Finding("permissions", "problem", line, _PERMIT) for line in heard.violations()]
        except QueueUnavailable as exc:
            fix = "start it (`forebay up` brings its own), or set NATS_URL to where it is"
            return [Finding("nats", "problem", str(exc), fix)]


_PERMIT = "look as `operator` or `admin` of deploy/nats/forebay.conf, or allow this user there what it names"

_JS = "$JS.API."
_MUST_PUBLISH: dict[str, tuple[str, ...]] = {
    "api": (
        "inference.requests.*.*",
        "inference.cancel.*",
        "inference.resend.*",
        f"$KV.{names.REQUESTS_BUCKET}.*",
        f"$KV.{names.ANSWERS_BUCKET}.*",
        f"$KV.{names.APIS_BUCKET}.*",
        "inference.counters.*",
        f"{_JS}STREAM.INFO.{names.STREAM}",
        f"{_JS}STREAM.MSG.DELETE.{names.STREAM}",
        f"{_JS}CONSUMER.LIST.{names.STREAM}",
    ),
    "inference": (
        f"{_JS}CONSUMER.MSG.NEXT.{names.STREAM}.*",
        f"$JS.ACK.{names.STREAM}.>",
        "inference.replies.*.*",
        "inference.cancel.*",
        f"$KV.{names.REQUESTS_BUCKET}.*",
        f"$KV.{names.WORKERS_BUCKET}.*",
        "inference.counters.*",
        f"{_JS}STREAM.INFO.{names.STREAM}",
    ),
    "operator": (
        f"{_JS}INFO",
        f"{_JS}STREAM.INFO.{names.STREAM}",
        f"{_JS}CONSUMER.LIST.{names.STREAM}",
        f"{_JS}DIRECT.GET.{names.bucket_stream(names.REQUESTS_BUCKET)}",
    ),
    "admin": (
        f"{_JS}STREAM.CREATE.*",
        f"{_JS}STREAM.UPDATE.*",
        f"{_JS}CONSUMER.DURABLE.CREATE.{names.STREAM}.*",
        f"{_JS}CONSUMER.PAUSE.{names.STREAM}.*",
        "inference.drain.*",
    ),
}
_MUST_HEAR: dict[str, tuple[str, ...]] = {
    "api": ("inference.replies.*.*", "inference.cancel.*", f"$KV.{names.WORKERS_BUCKET}.>"),
    "inference": ("inference.cancel.*", "inference.resend.*", f"$KV.{names.APIS_BUCKET}.>"),
    "operator": (),
    "admin": (),
}
"""What the roles of deploy/nats/forebay.conf cannot do without; `tests/security` holds them to that file."""


async def _permissions(link: Connection, _: Settings) -> list[Finding]:
    own = await permissions.own(link)
    if own is None:
        return [Finding("permissions", "warning", "the server does not say what this user may do", _ASK)]
    missing = {
        role: [f"publish to {subject}" for subject in _MUST_PUBLISH[role] if not own.publish.permit(subject)]
        + [f"subscribe to {subject}" for subject in _MUST_HEAR[role] if not own.subscribe.permit(subject)]
        for role in _MUST_PUBLISH
    }
    able = [role for role, lacks in missing.items() if not lacks]
    if able:
        return [Finding("permissions", "ok", f"this user may do what is needed as {', '.join(able)}")]
    role = min(missing, key=lambda role: len(missing[role]) / len(_MUST_PUBLISH[role]))
    fix = f"allow it in {role.upper()}_MAY of deploy/nats/forebay.conf, and reload the server"
    return [Finding("permissions", "problem", f"as {role}, this user may not {lack}", fix) for lack in missing[role]]


_ASK = "as api or inference, give `--role`; else allow it to publish to `$SYS.REQ.USER.INFO`"


class _Heard(logging.Handler):
    """What the connection logs meanwhile: a refused subject is told nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._logger = logging.getLogger("forebay_contracts.connection")

    def __enter__(self) -> "_Heard":
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self._lines.append(record.getMessage())

    def violations(self) -> list[str]:
        """The refusals, each once."""
        lines = dict.fromkeys(line.removeprefix("[RequestQueue] NATS: ") for line in self._lines)
        return [line for line in lines if "ermissions" in line]


async def _ask(link: Connection, request: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await link.client.request(f"$JS.API.{request}", b"", timeout=TIMEOUT_S)).data)
    return answer


async def _jetstream(link: Connection, _: Settings) -> list[Finding]:
    info = await _ask(link, "INFO")
    if "error" in info:
        fix = "start nats-server with JetStream (`-js`), and enable it for the account"
        return [Finding("jetstream", "problem", f"JetStream is off: {info['error'].get('description')}", fix)]
    used, most = info["storage"], info["limits"]["max_storage"]
    if most > 0 and used * 100 >= most * FULL_PERCENT:
        message = f"{used * 100 // most} % of the account's storage of {_size(most)} is used"
        return [Finding("jetstream", "warning", message, "raise the account's max_storage, or lower MAX_QUEUE_SIZE")]
    limit = "without a limit" if most <= 0 else f"of {_size(most)}"
    return [Finding("jetstream", "ok", f"{_size(used)} of storage used, {limit}")]


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


async def _models(link: Connection, _: Settings) -> list[Finding]:
    try:
        consumers = await topology.consumers(link)
    except NotFoundError:
        return []
    workers = await _alive(link, names.WORKERS_BUCKET, WorkerInfo)
    found = []
    for consumer in consumers:
        model = (consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name)
        serving = [worker for worker in workers if worker.model == model]
        ready = sum(worker.status is WorkerStatus.READY for worker in serving)
        waiting = consumer.num_pending or 0
        if consumer.paused:
            message = f"{model} is paused until {consumer.config.pause_until}; {waiting} wait"
            found.append(Finding("models", "warning", message, f"`forebay resume {model}`"))
        if ready:
            found.append(Finding("models", "ok", f"{model}: {ready} ready, {waiting} wait"))
        elif serving:
            doing = ", ".join(sorted({worker.progress or worker.status.value for worker in serving}))
            fix = "wait for it; `forebay status --watch` shows how far it is"
            found.append(
                Finding("models", "warning", f"{model}: its workers are not ready ({doing}); {waiting} wait", fix)
            )
        else:
            fix = "start one (`forebay inference`, or `forebay up`); its log says why it ended"
            found.append(Finding("models", "problem", f"{model} has no worker; {waiting} wait", fix))
    return found


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


def _of_machine(read: Settings) -> list[Finding]:
    data_dir = read.data_dir.expanduser()
    return [*_disk(data_dir), *_model_cache(read.default_model, data_dir)]


def _disk(data_dir: Path) -> Iterator[Finding]:
    there = next(folder for folder in (data_dir, *data_dir.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "problem", f"{there} cannot be written", "set DATA_DIR to a folder that can")
        return
    free = shutil.disk_usage(there).free
    severity: Severity = "problem" if free < TOO_LOW_DISK_BYTES else "warning" if free < LOW_DISK_BYTES else "ok"
    fix = "" if severity == "ok" else "make room, or set DATA_DIR to a larger disk"
    yield Finding("disk", severity, f"{_size(free)} free for DATA_DIR={data_dir}", fix)


def _model_cache(model: str, data_dir: Path) -> Iterator[Finding]:
    path = Path(model).expanduser()
    if path.is_dir() or path.suffix == ".gguf" or model.startswith(("/", "./", "../", "~")):
        there = (path / "config.json").is_file() if path.is_dir() else path.is_file()
        fix = "" if there else "set DEFAULT_MODEL to a folder with a config.json, a GGUF file, or a hub id"
        yield Finding("model", "ok" if there else "problem", f"{path} is {'' if there else 'not '}there", fix)
        return
    slug = model.replace("/", "--")
    folders = [folder for folder in (data_dir / "models").glob(f"{slug}-v*") if (folder / "config.json").is_file()]
    for folder in folders:
        yield from _checked(folder)
    if not folders:
        if (data_dir / "hub" / f"models--{slug}").is_dir():
            yield Finding("model", "ok", f"{model} is in the hub's cache, which keeps checksums of its own")
        else:
            # The default one comes as a package; a worker on another machine has a cache of its own.
            yield Finding("model", "ok", f"{model} is not on this machine: its first worker here fetches it")
    partial = list((data_dir / "models").glob(f".{slug}*.partial-*"))
    if partial:
        fix = "none if a worker is starting now; else its next start removes it"
        yield Finding("model", "warning", f"{partial[0]} is half made", fix)


def _checked(folder: Path) -> Iterator[Finding]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        yield Finding("model", "ok", f"{folder} is complete; it was made before checksums were written")
        return
    fix = f"remove the folder: `rm -r {folder}`; the next start makes it anew"
    wrong = [name for digest, name in _lines(manifest) if _digest(folder / name) != digest]
    if wrong:
        yield Finding("model", "problem", f"{folder}: {', '.join(wrong)} is not what was written", fix)
    else:
        yield Finding("model", "ok", f"{folder} is complete, its checksums are right")


def _lines(manifest: Path) -> Iterator[tuple[str, str]]:
    for line in manifest.read_text().splitlines():
        digest, _, name = line.partition("  ")
        yield digest, name


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
