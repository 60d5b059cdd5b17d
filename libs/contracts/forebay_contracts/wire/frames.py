"""What travels back on the reply subject, in this order: `started (delta)* (completed | failed)`.

Each frame carries the number of its attempt, and a delta the offset of its first token within its choice. So a receiver
can drop frames of older attempts, and notice and repair a gap.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, TypeAdapter

from forebay_contracts.wire.errors import ApiError, InferenceFailed, RequestCancelled, RequestTimeout
from forebay_contracts.wire.message import Message
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage


class TopLogprob(Message):
    """One alternative at one position. The first token of a prompt has no `logprob`.

    If the token is only a part of a character, `text` is a replacement character and `raw` holds the bytes.
    """

    token: int
    text: str
    logprob: float | None
    raw: tuple[int, ...] | None = None

    @property
    def utf8(self) -> bytes:
        """The bytes of the token."""
        return self.text.encode() if self.raw is None else bytes(self.raw)


class TokenLogprob(TopLogprob):
    """The log probability of a chosen token, and the best alternatives, best first. `rank` counts from 1."""

    rank: int | None = None
    top: tuple[TopLogprob, ...] = ()


class FrameMessage(Message):
    """A frame on the reply subject, of attempt number `attempt`, from 1."""

    type: str
    attempt: int = Field(ge=1)

    def encode(self) -> bytes:
        """The frame as JSON: its type, and the fields that differ from their defaults."""
        return b'{"type":"%s",' % self.type.encode() + super().encode()[1:]


class Delta(FrameMessage):
    """The next tokens of one choice, and the text that may be shown now.

    `offset` counts the tokens before these in this choice. `text` lags behind the tokens while a character or a
    possible stop string is incomplete, so it may be empty. It depends only on the tokens up to here, so a next attempt
    that starts from these tokens continues the text exactly. The `reasoning` of a delta stands before its text. With
    `prompt` set, the tokens are the prompt's: they come before the choice's own, if the request has `return_prompt`.

    An `embedding` is a whole choice: float32 values, little-endian, in base64; of a document to rerank one, its score.
    Its one token has no meaning. It makes
    the embedding a delta that is counted, dropped when repeated, and sent again when lost.
    """

    type: Literal["delta"] = "delta"
    index: int = Field(0, ge=0)
    offset: int = Field(0, ge=0)
    tokens: tuple[int, ...] = ()
    text: str = ""
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    embedding: str = ""
    prompt: bool = False

    @property
    def made(self) -> int:
        """How many tokens the model has made."""
        return 0 if self.prompt or self.embedding else len(self.tokens)


def encode_delta(attempt: int, index: int, offset: int, tokens: Sequence[int], text: str, reasoning: str = "") -> bytes:
    """What `Delta.encode` gives for a delta that has only tokens, text and reasoning, without making one.

    Takes 0.6 us instead of 3.9: a tenth of a worker's CPU time for a stream of 20 tokens.
    """
    frame: dict[str, Any] = {"type": "delta", "attempt": attempt}
    if index:
        frame["index"] = index
    if offset:
        frame["offset"] = offset
    frame["tokens"] = tokens
    if text:
        frame["text"] = text
    if reasoning:
        frame["reasoning"] = reasoning
    return orjson.dumps(frame)


class Started(FrameMessage):
    """A worker has begun.

    It is a NATS request, answered by `Resume`, if the client may have tokens of an earlier attempt: from attempt 2 on,
    and after an outage of NATS. `accepted` says that the request is valid, and `prompt_tokens` how long its prompt is,
    0: not known yet.
    """

    type: Literal["started"] = "started"
    worker: str
    accepted: bool = True
    prompt_tokens: int = 0


class FinishedChoice(Message):
    """How one choice ended, and its number of tokens. `stop_string` is the one that ended it, if one did."""

    index: int
    finish_reason: str
    tokens: int
    stop_string: str | None = None


class Completed(FrameMessage):
    """The last frame of a success: a NATS request, answered by `Resume`.

    `deltas` are those not sent before. `at` is when the answer was whole, in seconds since the epoch.
    """

    type: Literal["completed"] = "completed"
    choices: tuple[FinishedChoice, ...]
    usage: Usage
    deltas: tuple[Delta, ...] = ()
    at: float = 0.0

    @property
    def cut(self) -> bool:
        """Whether a choice ended at its most tokens."""
        return any(choice.finish_reason == "length" for choice in self.choices)


class Failed(FrameMessage):
    """The last frame of anything else: the error for the client."""

    type: Literal["failed"] = "failed"
    status: int
    error_type: str
    code: str | None = None
    message: str
    param: str | None = None


Frame = Annotated[Started | Delta | Completed | Failed, Field(discriminator="type")]


_frames: TypeAdapter[Frame] = TypeAdapter(Frame)


def decode_frame(data: bytes) -> Frame:
    """Decode a frame. Raises pydantic's ValidationError."""
    return _frames.validate_json(data)


def outcome_of(frame: Completed | Failed) -> RequestStatus:
    """How a request ended whose last frame this is."""
    if isinstance(frame, Completed):
        return RequestStatus.COMPLETED
    by_code: dict[str | None, RequestStatus] = {
        RequestTimeout.code: RequestStatus.TIMED_OUT,
        RequestCancelled.code: RequestStatus.CANCELLED,
    }
    return by_code.get(frame.code, RequestStatus.FAILED)


def error_of(state: RequestState) -> ApiError | None:
    """The error for a client that still waits for a request in this final state. None if it has the answer."""
    message = state.error or "the request has ended"
    match state.status:
        case RequestStatus.COMPLETED:
            return None
        case RequestStatus.TIMED_OUT:
            return RequestTimeout(message)
        case RequestStatus.CANCELLED:
            return RequestCancelled(f"the request was cancelled: {message}")
        case _:
            return InferenceFailed(message)


def failed(attempt: int, error: ApiError) -> Failed:
    """The frame for `error`."""
    return Failed(
        attempt=attempt,
        status=error.status,
        error_type=error.type,
        code=error.code,
        message=error.message,
        param=error.param,
    )


class ResumedChoice(Message):
    """What the client already has of one choice: its tokens, in order."""

    index: int
    tokens: tuple[int, ...]


class Resume(Message):
    """The api's answer to `started`, `completed` and `failed`: what its client has so far.

    If `wanted` is false, nobody waits any more. Then `outcome` says how the request ended, if the api knows, `usage`
    what a whole answer took, and `cut` whether it ended at its most tokens. With `newest`, only this attempt is not
    wanted: one of that number has begun.
    """

    wanted: bool = True
    outcome: RequestStatus | None = None
    usage: Usage | None = None
    newest: int | None = None
    cut: bool = False
    choices: tuple[ResumedChoice, ...] = ()
