"""All names on NATS: streams, subjects, consumers, buckets, headers. No other module spells one out."""

import base64
import functools
import re
import uuid
from typing import Final
from urllib.parse import quote, unquote

from forebay_contracts.wire.state import RequestStatus

STREAM: Final = "INFERENCE"
STREAM_SUBJECTS: Final = "inference.requests.>"

COUNTERS: Final = "INFERENCE_COUNTERS"
COUNTER_SUBJECTS: Final = "inference.counters.>"

USAGE: Final = "INFERENCE_USAGE"
USAGE_SUBJECTS: Final = "inference.usage.*.*.*"

ANSWERS: Final = "INFERENCE_ANSWERS"
ANSWER_SUBJECTS: Final = "inference.answers.*"
ANSWERED_SUBJECTS: Final = "inference.answered.{{wildcard(1)}}"
"""Where the server publishes again what the answer log has stored, and nothing that it refused."""

DEFERRED: Final = "INFERENCE_DEFERRED"
DEFERRED_SUBJECTS: Final = "inference.deferred.*.*"
YIELDED_SUBJECTS: Final = "inference.yielded.*.*"
REQUEST_SUBJECTS: Final = "inference.requests.*.*"
ADMITTED_SUBJECTS: Final = "inference.admitted.{{wildcard(1)}}"
"""Where the server publishes the headers of each message of the stream INFERENCE again."""

ROOM_SUBJECTS: Final = "inference.*.*.*"
WAITING_SUBJECTS: Final = "inference.waiting.{{wildcard(2)}}"
"""Where the server publishes the headers of each request again that the waiting room takes."""

WEBHOOKS: Final = "INFERENCE_WEBHOOKS"
WEBHOOK_SUBJECT: Final = "inference.webhooks"
WEBHOOKS_CONSUMER: Final = "webhooks"

FAILED: Final = "INFERENCE_FAILED"
FAILED_SUBJECTS: Final = "inference.failed.*.*"
CONVERSATION_SUBJECTS: Final = "inference.conversations.*.*"

REQUESTS_BUCKET: Final = "inference-requests"
WORKERS_BUCKET: Final = "inference-workers"
APIS_BUCKET: Final = "inference-apis"
ANSWERS_BUCKET: Final = "inference-answers"
RESPONSES_BUCKET: Final = "inference-responses"

FILES_BUCKET: Final = "inference-files"
BATCHES_BUCKET: Final = "inference-batches"

BATCHES: Final = "INFERENCE_BATCHES"
BATCH_SUBJECTS: Final = "inference.batches.*"
BATCHES_CONSUMER: Final = "batches"

HEADER_DEADLINE: Final = "Forebay-Deadline"
HEADER_REPLY_TO: Final = "Forebay-Reply-To"
HEADER_MSG_ID: Final = "Nats-Msg-Id"
HEADER_INCREMENT: Final = "Nats-Incr"
HEADER_TTL: Final = "Nats-TTL"
HEADER_DEFERRED: Final = "Forebay-Deferred"
"""On a request that waits in the waiting room, or was moved from there: its completion type."""

TRACE_HEADERS: Final = ("traceparent", "tracestate")
HEADER_CANCEL: Final = "Forebay-Cancel"
"""On a cancel subject: `ask` asks the api that holds the client to cancel. Without it the request is cancelled."""

HTTP_FORWARDED: Final = "forebay-forwarded"
"""HTTP header of a request that a worker passes on to a server that it asks in text: the id that the request has there,
behind the ids that it had before, separated by commas."""

NO_KEY: Final = "_"
"""In subjects of the waiting room: no key. No key has this name."""

HEADER_LINES: Final = "Forebay-Lines"
"""On the last chunk of a part of a batch's output: JSON, see `forebay_api/batches/output.py`."""
HEADER_ACK: Final = "Forebay-Ack"
"""On a delivery that a worker passes on: the subject that acknowledges it."""

RESPONSE_PREFIX: Final = "resp_"
MESSAGE_PREFIX: Final = "msg_"
COMPLETION_PREFIXES: Final = ("chatcmpl-", "cmpl-")
"""What the ids of responses, messages and completions begin with."""

MODEL_METADATA: Final = "forebay.model"
"""Metadata key of a consumer: the full name of its model."""

ALIASES_METADATA: Final = "forebay.aliases"
"""Metadata key of a consumer: the other names of its model, comma-separated, from its newest worker."""

ADAPTERS_METADATA: Final = "forebay.adapters"
"""The same for the names of its LoRA adapters."""


def model_token(model: str) -> str:
    """A model's name as one subject token and consumer name: `org/Model-1.5` becomes `org-Model-1-5`."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", model).strip("-") or "model"


def _token(model: str) -> str:
    return model if model == "*" else model_token(model)


def adapter_model(model: str, adapter: str | None) -> str:
    """How clients name a model that answers with `adapter`."""
    return model if adapter is None else f"{model}:{adapter}"


def request_subject(model: str, completion_type: str) -> str:
    """Where a request for `model` is published."""
    return f"inference.requests.{model_token(model)}.{completion_type}"


def model_subjects(model: str) -> str:
    """The filter of the consumer of `model`."""
    return f"inference.requests.{model_token(model)}.*"


def reply_subject(api: str, request_id: str) -> str:
    """The subject for the frames of one request."""
    return f"inference.replies.{api}.{request_id}"


def answer_subject(request_id: str) -> str:
    """The subject of a request's answer in the log."""
    return f"inference.answers.{request_id}"


def answered_subject(request_id: str) -> str:
    """The subject on which the server publishes again what the log has stored of a request's answer."""
    return f"inference.answered.{request_id}"


def is_logged(reply_to: str) -> bool:
    """Whether an answer to `reply_to` goes into the log, and not to one api."""
    return reply_to.startswith("inference.answers.")


def is_reply_subject(text: str) -> bool:
    """Whether frames of one request may be sent to `text`, the subject of an api."""
    return re.fullmatch(r"inference\.replies\.[A-Za-z0-9_-]{1,128}\.[A-Za-z0-9_-]{1,128}", text) is not None


def reply_subjects(api: str) -> str:
    """The subjects of all replies to one api instance."""
    return f"inference.replies.{api}.*"


def connected_subject(api: str) -> str:
    """A subject that an api subscribes to as long as it has a connection. It ignores what comes there."""
    return reply_subject(api, "connected")


def cancel_subject(request_id: str) -> str:
    """The subject for cancel notices of a request; `*` for all."""
    return f"inference.cancel.{request_id}"


def drain_subject(worker: str) -> str:
    """The subject on which a worker is told to end as on SIGTERM. It answers."""
    return f"inference.drain.{worker}"


def resend_subject(request_id: str) -> str:
    """The subject on which an api tells a request's worker what it has, so that the rest is sent; `*` for all."""
    return f"inference.resend.{request_id}"


def conversation_subject(model: str, key: str) -> str:
    """The subject on which workers that have the beginning of a conversation are asked for a free slot."""
    return f"inference.conversations.{model_token(model)}.{key}"


def handover_subject(worker: str) -> str:
    """The subject on which a worker gets deliveries from others."""
    return f"inference.handover.{worker}"


def counter_subject(outcome: RequestStatus) -> str:
    """The counter of requests that ended as `outcome`."""
    return f"inference.counters.{outcome.value}"


@functools.lru_cache(1_024)
def usage_subject(day: str, model: str, key: str | None) -> str:
    """The counter of what was used of `model` on a day, as `2026-11-30`, by requests with the key of this name, or
    without (None).

    Of the model's name, what a subject token must not hold is percent-encoded: `org/Model-1.5` is `org/Model-1%2E5`.
    """
    return f"inference.usage.{day}.{_encoded(model)}.{'-' if key is None else _encoded(key)}"


def usage_of(subject: str) -> tuple[str, str, str | None]:
    """The day, the model and the key of such a counter."""
    _, _, day, model, key = subject.split(".")
    return day, unquote(model), None if key == "-" else unquote(key)


def usage_subjects(day: str) -> str:
    """All such counters of a day."""
    return f"inference.usage.{day}.*.*"


def _encoded(name: str) -> str:
    return "%2D" if name == "-" else quote(name, safe="/:").replace(".", "%2E")


def bucket_subjects(bucket: str) -> str:
    """The subjects of a KV bucket's values (NATS ADR-8)."""
    return f"$KV.{bucket}.>"


def bucket_subject(bucket: str, key: str) -> str:
    """The subject of one key of a KV bucket (NATS ADR-8)."""
    return f"$KV.{bucket}.{key}"


def bucket_stream(bucket: str) -> str:
    """The stream behind a KV bucket (NATS ADR-8)."""
    return f"KV_{bucket}"


def deferred_subject(model: str, key: str | None) -> str:
    """Where a request of the client's key waits in the waiting room; `*` for all keys."""
    return f"inference.deferred.{model_token(model)}.{key or NO_KEY}"


def yielded_subject(model: str, key: str | None) -> str:
    """Where a request waits that gave way to another, before those of `deferred_subject`."""
    return f"inference.yielded.{model_token(model)}.{key or NO_KEY}"


def key_of_subject(subject: str) -> str | None:
    """The key in a subject of the waiting room."""
    key = subject.rsplit(".", 1)[-1]
    return None if key == NO_KEY else key


def admitted_subject(model: str) -> str:
    """Where the server says that a request for `model` was stored in the stream INFERENCE; `*` for all models."""
    return f"inference.admitted.{_token(model)}"


def waiting_subject(model: str) -> str:
    """Where the server says that the waiting room has taken a request for `model`; `*` for all models."""
    return f"inference.waiting.{_token(model)}"


def idle_subject(model: str) -> str:
    """Where workers of `model` say that a slot is idle, and what a deferred attempt has used; `*` for all models."""
    return f"inference.idle.{_token(model)}"


def message_id(request_id: str, turn: int) -> str:
    """The Nats-Msg-Id of a request that has given way `turn` times: its next message is no repetition."""
    return f"{request_id}.{turn}" if turn else request_id


def turn_of(message_id: str) -> tuple[str, int]:
    """The request id and the turn in a Nats-Msg-Id."""
    request_id, _, turn = message_id.partition(".")
    return request_id, int(turn) if turn.isdecimal() else 0


def object_stream(bucket: str) -> str:
    """The stream behind an object store (NATS ADR-20)."""
    return f"OBJ_{bucket}"


def object_subjects(bucket: str) -> list[str]:
    """The subjects of an object store (NATS ADR-20): chunks, and what is known of each object."""
    return [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"]


def chunk_subject(bucket: str, nuid: str) -> str:
    """The subject of the chunks of one object (NATS ADR-20)."""
    return f"$O.{bucket}.C.{nuid}"


def object_subject(bucket: str, name: str) -> str:
    """The subject of what is known of an object (NATS ADR-20)."""
    return f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def batch_subject(batch_id: str) -> str:
    """Where it is said that a batch is to be run."""
    return f"inference.batches.{batch_id}"


def is_request_id(text: str) -> bool:
    """Whether `text` can be a request id: it must be valid as a subject token and as a bucket key."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text) is not None


def response_id(request_id: str) -> str:
    """The id of the response to a request: the request id in another spelling."""
    return RESPONSE_PREFIX + request_id.replace("-", "")


def request_id(text: str) -> str:
    """The request id in the id of an answer, as clients get it: `resp_...`, `msg_...`, `chatcmpl-...`, `cmpl-...`.

    Any other text is returned as it is.
    """
    if found := re.fullmatch(rf"(?:{RESPONSE_PREFIX}|{MESSAGE_PREFIX})([0-9a-f]{{32}})", text):
        return str(uuid.UUID(found[1]))
    for prefix in COMPLETION_PREFIXES:
        if text.startswith(prefix):
            return text.removeprefix(prefix)
    return text


def retry_id(request_id: str) -> str:
    """The id under which a failed request runs again. Whoever retries it takes the same id, so it runs once."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, request_id))


def failed_subject(record: str, request_id: str) -> str:
    """The subject of a failed request that is kept. `record` is the key of its record: kind, owner, id."""
    return f"inference.failed.{record.split('.')[1]}.{request_id}"


def object_of(record: str) -> str:
    """What clients call the object of a record, by its key."""
    return record.rsplit(".", 1)[-1]


def id_of(reply_to: str) -> str:
    """The request id in the subject of an answer."""
    return reply_to.rsplit(".", 1)[-1]


def api_of(reply_to: str) -> str:
    """The api instance in a reply subject; empty if there is none, as for an answer that is logged."""
    parts = reply_to.split(".")
    return parts[2] if len(parts) == 4 else ""
