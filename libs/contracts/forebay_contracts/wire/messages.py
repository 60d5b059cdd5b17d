"""The messages on the wire: frozen, versioned, JSON (readable with `nats sub`).

`InferenceRequest` travels through the stream. The frames travel back on the reply subject, in this order:

    started (delta)* (completed | failed)

Each frame carries the delivery attempt it belongs to, and a delta the offset of its first token within its
choice, so that a receiver can drop what an older attempt sent, and notice and repair a gap.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION: Final = 1


class Message(BaseModel):
    """A frozen message. Unknown fields are ignored, so that a newer peer may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def encode(self) -> bytes:
        """The message as JSON."""
        return self.model_dump_json(exclude_defaults=True).encode()


class CompletionType(StrEnum):
    """What kind of answer a request wants."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


GENERATION: Final = (CompletionType.CHAT, CompletionType.COMPLETION)
"""What a model that generates text serves."""


RECOMMENDABLE: Final = ("temperature", "top_p", "top_k", "repetition_penalty")
"""The sampling parameters that a model may come with a recommendation for."""


class Sampling(Message):
    """How tokens are chosen; the names and ranges are OpenAI's, with the usual extensions.

    `max_tokens` None means: up to the model's context length. `stop` holds at most four strings.
    `logprobs` is how many alternatives to report for each token (0: the chosen one alone), None for none.
    `unset` names those of RECOMMENDABLE that the client left open: what the model recommends holds for them.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    unset: tuple[str, ...] = ()

    def settled(self, recommended: Mapping[str, float]) -> "Sampling":
        """With the model's recommendation where the client left it open."""
        return self.model_copy(update={name: recommended[name] for name in self.unset if name in recommended})


class InferenceRequest(Message):
    """One request as it waits in the stream.

    Times are seconds since the epoch. `messages` is set for chat and `prompts` for completion: each prompt
    is text or token ids. The answer has `len(prompts) * n` choices (`n` for chat), numbered from 0, the
    choices of one prompt together. For embedding, `prompts` are the inputs and the choices their vectors, cut
    to `dimensions` where that is set. `key` names the key that it came with, where there are any.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    completion_type: CompletionType
    model: str
    created_at: float
    deadline: float
    reply_to: str
    key: str | None = None
    stream: bool = False
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    sampling: Sampling = Field(default_factory=Sampling)
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    dimensions: int | None = None

    def encode(self) -> bytes:
        """The request as JSON, defaults left out but for the schema version."""
        return b'{"schema_version":%d,' % SCHEMA_VERSION + super().encode()[1:]


class Usage(Message):
    """Token counts of one request, over all its choices (the prompt counted once)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


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


class RequestStatus(StrEnum):
    """queued → processing → completed | failed, and from either of the first two cancelled or timed_out."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    @property
    def final(self) -> bool:
        """Whether no later write may change it."""
        return self not in (RequestStatus.QUEUED, RequestStatus.PROCESSING)


class Resume(Message):
    """The api's answer to `started` and `completed`: what its client has so far.

    `wanted` false: nobody waits any more, and `outcome` says how the request ended, where the api knows.
    """

    wanted: bool = True
    outcome: RequestStatus | None = None
    choices: tuple[ResumedChoice, ...] = ()


class RequestState(Message):
    """The value in the KV bucket `inference-requests`, its key the request id. Times: seconds since the epoch.

    `error` is what the client was told. `fault` is what went wrong at the latest attempt that failed, with its number
    and its worker, for who runs the system; it quotes no request. `started_at` is when the first attempt began.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    status: RequestStatus
    completion_type: str
    timestamp: float
    error: str | None = None
    fault: str | None = None
    model: str
    attempt: int = 0
    queued_at: float
    started_at: float | None = None
    finished_at: float | None = None
    deadline: float
    worker: str | None = None
    sequence: int | None = None
    handed_over: int = 0
    usage: Usage | None = None
    key: str | None = None

    def encode(self) -> bytes:
        """The state as JSON, every field written out for people who read it with `nats kv get`."""
        return self.model_dump_json().encode()


class WorkerStatus(StrEnum):
    """What a worker is doing."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ServiceInfo(Message):
    """A service's heartbeat. Times: seconds since the epoch."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    version: str
    started_at: float
    heartbeat_at: float

    def encode(self) -> bytes:
        """The heartbeat as JSON, every field written out."""
        return self.model_dump_json().encode()


class ApiInfo(ServiceInfo):
    """The heartbeat in the KV bucket `inference-apis`, its key the api instance's id.

    `unfinished` counts what each client's key, by name, has admitted and unfinished there.
    """

    unfinished: dict[str, int] = Field(default_factory=dict)


class WorkerInfo(ServiceInfo):
    """The heartbeat in the KV bucket `inference-workers`, its key the worker id."""

    model: str
    aliases: tuple[str, ...] = ()
    status: WorkerStatus
    progress: str | None = None
    slots: int
    busy: int = 0
    context_length: int | None = None
    quantization: str | None = None
    device: str | None = None
    engine: str
    completion_types: tuple[CompletionType, ...] = GENERATION
