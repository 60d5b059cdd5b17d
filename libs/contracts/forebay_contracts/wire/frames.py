"""What travels back on the reply subject, in this order: `started (delta)* (completed | failed)`.

Each frame carries the attempt it belongs to, and a delta the offset of its first token within its choice. So a
receiver can drop what an older attempt sent, and notice and repair a gap.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from forebay_contracts.wire.message import Message
from forebay_contracts.wire.state import RequestStatus, Usage


class TopLogprob(Message):
    """One alternative at one position.

    Where a token is a part of a character, `text` holds a replacement character and `raw` its bytes.
    """

    token: int
    text: str
    logprob: float
    raw: tuple[int, ...] | None = None

    @property
    def utf8(self) -> bytes:
        """The bytes that the token stands for."""
        return self.text.encode() if self.raw is None else bytes(self.raw)


class TokenLogprob(TopLogprob):
    """The log probability of a chosen token, and the best alternatives, best first."""

    top: tuple[TopLogprob, ...] = ()


class FrameMessage(Message):
    """A frame on the reply subject, of delivery attempt `attempt` (from 1)."""

    type: str
    attempt: int = Field(ge=1)

    def encode(self) -> bytes:
        """The frame as JSON, defaults left out but for its type."""
        return b'{"type":"%s",' % self.type.encode() + super().encode()[1:]


class Delta(FrameMessage):
    """The next tokens of one choice, and the text that they settle.

    `offset` counts the tokens before these in this choice. `text` is what may be shown now: it lags the
    tokens while a character or a possible stop string is incomplete, so it may be empty, and it is a function
    of the tokens up to here alone, so a second attempt that starts from these tokens goes on without a seam.

    An `embedding` is the whole of its choice: float32 values, little-endian, in base64. Its one token is of no
    meaning, but lets it be counted, dropped when it comes twice and sent again like any other.
    """

    type: Literal["delta"] = "delta"
    index: int = Field(0, ge=0)
    offset: int = Field(0, ge=0)
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    embedding: str = ""


class Started(FrameMessage):
    """A worker has taken the request and found it valid. From attempt 2 on a NATS request, answered by `Resume`."""

    type: Literal["started"] = "started"
    worker: str


class FinishedChoice(Message):
    """How one choice ended, and how many tokens it has in all."""

    index: int
    finish_reason: str
    tokens: int


class Completed(FrameMessage):
    """The terminal frame of a success: a NATS request, answered by `Resume` (what the receiver has so far)."""

    type: Literal["completed"] = "completed"
    choices: tuple[FinishedChoice, ...]
    usage: Usage
    deltas: tuple[Delta, ...] = ()


class Failed(FrameMessage):
    """The terminal frame of anything else: an error as the client will get it."""

    type: Literal["failed"] = "failed"
    status: int
    error_type: str
    code: str | None = None
    message: str
    param: str | None = None


Frame = Annotated[Started | Delta | Completed | Failed, Field(discriminator="type")]


_frames: TypeAdapter[Frame] = TypeAdapter(Frame)


def decode_frame(data: bytes) -> Frame:
    """A frame from the wire; raises pydantic's ValidationError on anything else."""
    return _frames.validate_json(data)


class ResumedChoice(Message):
    """What the client already has of one choice: its tokens, in order."""

    index: int
    tokens: tuple[int, ...]


class Resume(Message):
    """The api's answer to `started` and `completed`: what its client has so far.

    `wanted` false: nobody waits any more, and `outcome` says how the request ended, where the api knows.
    """

    wanted: bool = True
    outcome: RequestStatus | None = None
    choices: tuple[ResumedChoice, ...] = ()
