"""What the roles of deploy/nats/forebay.conf cannot do without, for `forebay doctor`."""

from typing import Final

from forebay_contracts.nats.permissions import Permissions
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus

_JS: Final = "$JS.API."
_GET: Final = f"{_JS}DIRECT.GET."
_REQUESTS = names.bucket_stream(names.REQUESTS_BUCKET)
_WORKERS = names.bucket_stream(names.WORKERS_BUCKET)
_APIS = names.bucket_stream(names.APIS_BUCKET)
_ANSWERS = names.bucket_stream(names.ANSWERS_BUCKET)
_CONSUMER_INFO = f"{_JS}CONSUMER.INFO.{names.STREAM}.*"
_CONSUMER_LIST = f"{_JS}CONSUMER.LIST.{names.STREAM}"
_STREAM_INFO = f"{_JS}STREAM.INFO.*"
_TOTALS = f"{_GET}{names.COUNTERS}.>"

# Between accounts, what somebody answers goes to a subject of the server's own.
_ACROSS_ACCOUNTS = "_R_.>"

PUBLISH: Final = "publish to"
HEAR: Final = "subscribe to"


def _publish(*subjects: str) -> tuple[tuple[str, str], ...]:
    return tuple((PUBLISH, subject) for subject in subjects)


def _hear(*subjects: str) -> tuple[tuple[str, str], ...]:
    return tuple((HEAR, subject) for subject in subjects)


def _values(bucket: str) -> str:
    return names.bucket_subjects(bucket).replace(">", "*")


ROLES: Final = {
    "api": (
        *_publish(
            "inference.requests.*.*",
            names.cancel_subject("*"),
            names.resend_subject("*"),
            "inference.counters.*",
            _values(names.REQUESTS_BUCKET),
            _values(names.ANSWERS_BUCKET),
            _values(names.APIS_BUCKET),
            _STREAM_INFO,
            f"{_GET}{names.STREAM}",
            f"{_JS}STREAM.MSG.DELETE.{names.STREAM}",
            _CONSUMER_LIST,
            _CONSUMER_INFO,
            f"{_GET}{_REQUESTS}",
            f"{_GET}{_REQUESTS}.>",
            f"{_GET}{_ANSWERS}.>",
            f"{_GET}{_WORKERS}",
            f"{_GET}{_APIS}",
            _TOTALS,
            _ACROSS_ACCOUNTS,
        ),
        *_hear(
            "_INBOX.api.>",
            names.reply_subjects("*"),
            names.cancel_subject("*"),
            names.bucket_subjects(names.WORKERS_BUCKET),
            names.bucket_subjects(names.APIS_BUCKET),
            names.bucket_subjects(names.REQUESTS_BUCKET),
            _values(names.ANSWERS_BUCKET),
        ),
    ),
    "inference": (
        *_publish(
            f"{_JS}CONSUMER.MSG.NEXT.{names.STREAM}.*",
            f"$JS.ACK.{names.STREAM}.>",
            names.reply_subjects("*"),
            names.cancel_subject("*"),
            "inference.counters.*",
            _values(names.REQUESTS_BUCKET),
            _values(names.WORKERS_BUCKET),
            _STREAM_INFO,
            _CONSUMER_INFO,
            f"{_GET}{_REQUESTS}.>",
            f"{_GET}{_APIS}",
            _ACROSS_ACCOUNTS,
        ),
        *_hear(
            "_INBOX.inference.>",
            names.cancel_subject("*"),
            names.resend_subject("*"),
            names.drain_subject("*"),
            names.bucket_subjects(names.APIS_BUCKET),
        ),
    ),
    "operator": (
        *_publish(
            f"{_JS}INFO",
            _STREAM_INFO,
            _CONSUMER_LIST,
            _CONSUMER_INFO,
            f"{_GET}{_REQUESTS}",
            f"{_GET}{_REQUESTS}.>",
            f"{_GET}{_WORKERS}",
            f"{_GET}{_APIS}",
            _TOTALS,
        ),
        *_hear("_INBOX.cli.>"),
    ),
    "admin": (
        *_publish(
            f"{_JS}STREAM.CREATE.*",
            f"{_JS}STREAM.UPDATE.*",
            f"{_JS}CONSUMER.DURABLE.CREATE.{names.STREAM}.*",
            f"{_JS}CONSUMER.PAUSE.{names.STREAM}.*",
            names.drain_subject("*"),
            # `forebay cancel`
            _values(names.REQUESTS_BUCKET),
            names.counter_subject(RequestStatus.CANCELLED),
            names.cancel_subject("*"),
            f"{_GET}{names.STREAM}",
            f"{_JS}STREAM.MSG.DELETE.{names.STREAM}",
            f"{_GET}{_REQUESTS}.>",
        ),
        *_hear("_INBOX.cli.>"),
    ),
}
"""By role, what it does and with which subjects; `$SYS.REQ.USER.INFO` is how these are looked at, and so not here."""


def missing(own: Permissions, role: str) -> list[str]:
    """What `role` needs and a user with `own` may not do."""
    may = {PUBLISH: own.publish, HEAR: own.subscribe}
    return [f"{does} {subject}" for does, subject in ROLES[role] if not may[does].permit(subject)]
