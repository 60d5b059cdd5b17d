"""What the roles of deploy/nats/forebay.conf need, and whether the user of this connection has it."""

from typing import Final

from forebay_cli.doctor.findings import Finding
from forebay_contracts.nats import permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.permissions import Permissions
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus

_JS: Final = "$JS.API."
_GET: Final = f"{_JS}DIRECT.GET."
_REQUESTS = names.bucket_stream(names.REQUESTS_BUCKET)
_WORKERS = names.bucket_stream(names.WORKERS_BUCKET)
_APIS = names.bucket_stream(names.APIS_BUCKET)
_KEYS = names.bucket_stream(names.ANSWERS_BUCKET)
_BATCHES = names.bucket_stream(names.BATCHES_BUCKET)
_FILES = names.object_stream(names.FILES_BUCKET)
_RESPONSES = names.bucket_stream(names.RESPONSES_BUCKET)
_CONSUMER_INFO = f"{_JS}CONSUMER.INFO.{names.STREAM}.*"
_BATCHES_INFO = f"{_JS}CONSUMER.INFO.{names.BATCHES}.*"
_EVENTS_INFO = f"{_JS}CONSUMER.INFO.{names.WEBHOOKS}.{names.WEBHOOKS_CONSUMER}"
_STREAM_INFO = f"{_JS}STREAM.INFO.*"

# The numbers of the queue, the states and the heartbeats.
_READS_QUEUE = (
    _STREAM_INFO,
    f"{_JS}CONSUMER.LIST.{names.STREAM}",
    _CONSUMER_INFO,
    f"{_GET}{_REQUESTS}",
    f"{_GET}{_REQUESTS}.>",
    f"{_GET}{_WORKERS}",
    f"{_GET}{_APIS}",
    f"{_GET}{names.COUNTERS}.>",
)

# The counters of usage, by their names: `_STREAM_INFO` lists these.
_READS_USAGE = (f"{_GET}{names.USAGE}",)

# Stored answers: the last record of one, and all of it.
_READS_ANSWERS = (f"{_GET}{names.ANSWERS}", f"{_GET}{names.ANSWERS}.>")

# Between accounts, the server replaces reply subjects by these.
_ACROSS_ACCOUNTS = "_R_.>"

_BETWEEN_WORKERS = (names.CONVERSATION_SUBJECTS, names.handover_subject("*"))

_STEERS = (f"{_JS}CONSUMER.PAUSE.{names.STREAM}.*", names.drain_subject("*"))


def _values(bucket: str) -> str:
    return names.bucket_subjects(bucket).replace(">", "*")


_FILES_AND_BATCHES = (
    f"$O.{names.FILES_BUCKET}.*.*",
    f"{_GET}{_FILES}",
    f"{_GET}{_FILES}.>",
    f"{_JS}STREAM.PURGE.{_FILES}",
    f"{_JS}STREAM.MSG.DELETE.{_FILES}",
    f"{_values(names.BATCHES_BUCKET)}.*.*",
    f"{_GET}{_BATCHES}",
    f"{_GET}{_BATCHES}.>",
    names.BATCH_SUBJECTS,
    _BATCHES_INFO,
    f"{_JS}CONSUMER.MSG.NEXT.{names.BATCHES}.*",
    f"$JS.ACK.{names.BATCHES}.>",
)

PUBLISHES: Final = {
    "api": (
        "inference.requests.*.*",
        names.DEFERRED_SUBJECTS,
        f"{_GET}{names.DEFERRED}",
        f"{_JS}STREAM.MSG.DELETE.{names.DEFERRED}",
        names.cancel_subject("*"),
        names.resend_subject("*"),
        "inference.counters.*",
        _values(names.REQUESTS_BUCKET),
        names.answer_subject("*"),
        _values(names.ANSWERS_BUCKET),
        _values(names.APIS_BUCKET),
        f"{_values(names.RESPONSES_BUCKET)}.*.*",
        f"{_GET}{names.STREAM}",
        f"{_JS}STREAM.MSG.DELETE.{names.STREAM}",
        *_READS_QUEUE,
        f"{_GET}{_KEYS}.>",
        f"{_GET}{_RESPONSES}",
        f"{_GET}{_RESPONSES}.>",
        *_READS_ANSWERS,
        f"{_JS}STREAM.PURGE.{names.ANSWERS}",
        *_FILES_AND_BATCHES,
        names.WEBHOOK_SUBJECT,
        _EVENTS_INFO,
        f"{_JS}CONSUMER.MSG.NEXT.{names.WEBHOOKS}.{names.WEBHOOKS_CONSUMER}",
        f"$JS.ACK.{names.WEBHOOKS}.>",
        f"{_GET}{names.FAILED}",
        f"{_JS}STREAM.PURGE.{names.FAILED}",
        _ACROSS_ACCOUNTS,
        names.USAGE_SUBJECTS,
        *_READS_USAGE,
        f"{_JS}STREAM.PURGE.{names.USAGE}",
        *_STEERS,
    ),
    "inference": (
        f"{_JS}CONSUMER.MSG.NEXT.{names.STREAM}.*",
        f"$JS.ACK.{names.STREAM}.>",
        names.reply_subjects("*"),
        names.answer_subject("*"),
        names.cancel_subject("*"),
        names.YIELDED_SUBJECTS,
        names.idle_subject("*"),
        names.admitted_subject("*"),
        "inference.counters.*",
        _values(names.REQUESTS_BUCKET),
        _values(names.WORKERS_BUCKET),
        _STREAM_INFO,
        _CONSUMER_INFO,
        _BATCHES_INFO,
        f"{_GET}{_REQUESTS}.>",
        f"{_GET}{_WORKERS}",
        f"{_GET}{_APIS}",
        *_READS_ANSWERS,
        names.WEBHOOK_SUBJECT,
        _EVENTS_INFO,
        names.FAILED_SUBJECTS,
        _ACROSS_ACCOUNTS,
        names.USAGE_SUBJECTS,
        *_BETWEEN_WORKERS,
    ),
    "operator": (f"{_JS}INFO", *_READS_QUEUE, *_READS_ANSWERS, f"{_GET}{names.FAILED}", *_READS_USAGE),
    "admin": (
        f"{_JS}STREAM.CREATE.*",
        f"{_JS}STREAM.UPDATE.*",
        f"{_JS}CONSUMER.DURABLE.CREATE.{names.STREAM}.*",
        f"{_JS}CONSUMER.DURABLE.CREATE.{names.BATCHES}.*",
        f"{_JS}CONSUMER.DURABLE.CREATE.{names.WEBHOOKS}.*",
        *_STEERS,
        # `forebay cancel`
        _values(names.REQUESTS_BUCKET),
        names.counter_subject(RequestStatus.CANCELLED),
        names.cancel_subject("*"),
        names.answer_subject("*"),
        names.WEBHOOK_SUBJECT,
        *_READS_ANSWERS,
        f"{_GET}{names.STREAM}",
        f"{_JS}STREAM.MSG.DELETE.{names.STREAM}",
        f"{_GET}{names.DEFERRED}",
        f"{_JS}STREAM.MSG.DELETE.{names.DEFERRED}",
        f"{_GET}{_REQUESTS}.>",
        names.USAGE_SUBJECTS,
        "$JS.SNAPSHOT.>",  # `forebay backup` and `forebay restore`
    ),
}
"""By role, the subjects that it publishes to. `$SYS.REQ.USER.INFO`, which this check itself asks, is left out."""

SUBSCRIBES: Final = {
    "api": (
        "_INBOX.api.>",
        names.reply_subjects("*"),
        names.answered_subject("*"),
        names.cancel_subject("*"),
        names.idle_subject("*"),
        names.waiting_subject("*"),
        names.bucket_subjects(names.WORKERS_BUCKET),
        names.bucket_subjects(names.APIS_BUCKET),
        names.bucket_subjects(names.REQUESTS_BUCKET),
    ),
    "inference": (
        "_INBOX.inference.>",
        names.cancel_subject("*"),
        names.resend_subject("*"),
        names.drain_subject("*"),
        names.admitted_subject("*"),
        names.bucket_subjects(names.APIS_BUCKET),
        *_BETWEEN_WORKERS,
    ),
    "operator": ("_INBOX.cli.>",),
    "admin": ("_INBOX.cli.>",),
}
"""By role, the subjects that it subscribes to."""


def missing(own: Permissions, role: str) -> list[str]:
    """What `role` needs and a user with the permissions `own` lacks."""
    return [
        *(f"publish to {subject}" for subject in PUBLISHES[role] if not own.publish.permit(subject)),
        *(f"subscribe to {subject}" for subject in SUBSCRIBES[role] if not own.subscribe.permit(subject)),
    ]


async def check(link: Connection, _: Settings) -> list[Finding]:
    """The roles that this user can take, or what it lacks for the role that it is nearest to."""
    own = await permissions.own(link)
    if own is None:
        fix = "for an api's or a worker's user, give `--role`; else allow it to publish to `$SYS.REQ.USER.INFO`"
        return [Finding("permissions", "warning", "the server does not say what this user may do", fix)]
    lacks = {role: missing(own, role) for role in PUBLISHES}
    able = [role for role, lacking in lacks.items() if not lacking]
    if able:
        return [Finding("permissions", "ok", f"this user has the permissions of {', '.join(able)}")]
    role = min(lacks, key=lambda role: len(lacks[role]) / len(PUBLISHES[role] + SUBSCRIBES[role]))
    fix = f"allow it in {role.upper()}_MAY of deploy/nats/forebay.conf, and reload the server"
    return [Finding("permissions", "problem", f"as {role}, this user may not {lack}", fix) for lack in lacks[role]]
