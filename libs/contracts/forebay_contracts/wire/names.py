"""Every name that is seen on NATS, and nowhere else: streams, subjects, consumers, buckets, headers."""

import re
from typing import Final

from forebay_contracts.wire.state import RequestStatus

STREAM: Final = "INFERENCE"
STREAM_SUBJECTS: Final = "inference.requests.>"

COUNTERS: Final = "INFERENCE_COUNTERS"
COUNTER_SUBJECTS: Final = "inference.counters.>"

REQUESTS_BUCKET: Final = "inference-requests"
WORKERS_BUCKET: Final = "inference-workers"
APIS_BUCKET: Final = "inference-apis"
ANSWERS_BUCKET: Final = "inference-answers"

HEADER_DEADLINE: Final = "Forebay-Deadline"
HEADER_REPLY_TO: Final = "Forebay-Reply-To"
HEADER_MSG_ID: Final = "Nats-Msg-Id"
HEADER_INCREMENT: Final = "Nats-Incr"
HEADER_TTL: Final = "Nats-TTL"
HEADER_CANCEL: Final = "Forebay-Cancel"
"""On a cancel subject: `ask` marks a question to the api that holds the client; without it, the request has ended."""

MODEL_METADATA: Final = "forebay.model"
"""Key of a consumer's metadata that holds the full name of its model."""

ALIASES_METADATA: Final = "forebay.aliases"
"""Key of a consumer's metadata that holds the other names of its model, comma-separated, as of its newest worker."""


def model_token(model: str) -> str:
    """A model's name as one subject token and consumer name: `org/Model-1.5` becomes `org-Model-1-5`."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", model).strip("-") or "model"


def request_subject(model: str, completion_type: str) -> str:
    """Where a request for `model` is published."""
    return f"inference.requests.{model_token(model)}.{completion_type}"


def model_subjects(model: str) -> str:
    """What the consumer of `model` filters on."""
    return f"inference.requests.{model_token(model)}.*"


def reply_subject(api: str, request_id: str) -> str:
    """Where the frames of one request go."""
    return f"inference.replies.{api}.{request_id}"


def is_reply_subject(text: str) -> bool:
    """Whether frames of one request may be sent to `text`."""
    return re.fullmatch(r"inference\.replies\.[A-Za-z0-9_-]{1,128}\.[A-Za-z0-9_-]{1,128}", text) is not None


def reply_subjects(api: str) -> str:
    """All replies to one api instance."""
    return f"inference.replies.{api}.*"


def cancel_subject(request_id: str) -> str:
    """Where a request is cancelled; `*` for all."""
    return f"inference.cancel.{request_id}"


def drain_subject(worker: str) -> str:
    """Where a worker is told to end as by SIGTERM; it answers that it does."""
    return f"inference.drain.{worker}"


def resend_subject(request_id: str) -> str:
    """Where an api asks the worker that runs a request for deltas that it missed; `*` for all."""
    return f"inference.resend.{request_id}"


def counter_subject(outcome: RequestStatus) -> str:
    """The counter of requests that ended so."""
    return f"inference.counters.{outcome.value}"


def bucket_subjects(bucket: str) -> str:
    """The subjects under which a KV bucket's values are published (NATS ADR-8)."""
    return f"$KV.{bucket}.>"


def bucket_stream(bucket: str) -> str:
    """The stream behind a KV bucket (NATS ADR-8)."""
    return f"KV_{bucket}"


def is_request_id(text: str) -> bool:
    """Whether `text` can be a request's id, and so a token of a subject and a key of a bucket."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text) is not None


def api_of(reply_to: str) -> str:
    """The api instance that a reply subject belongs to; empty where it is none."""
    parts = reply_to.split(".")
    return parts[2] if len(parts) == 4 else ""
