"""What a client gets of the answer log."""

from collections.abc import Iterable

from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_contracts.queueing.protocols import Record
from forebay_contracts.wire.errors import RequestNotFound
from forebay_contracts.wire.frames import Completed, Failed, decode_frame, outcome_of
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus


class Reader:
    """Feeds an answer from the log while its block lasts. `last` is the sequence of the last record.

    Unless it is `wanted`, nothing of the answer is kept.
    """

    def __init__(self, request: InferenceRequest, *, wanted: bool = True) -> None:
        self.answer = LiveAnswer(request, lambda _: None, ordered=True)
        self.last = 0
        self._wanted = wanted

    def __enter__(self) -> LiveAnswer:
        return self.answer

    def __exit__(self, *_: object) -> None:
        self._wanted = False
        self.answer.take()

    def receive(self, records: Iterable[Record]) -> RequestStatus | None:
        """Take the next records; returns how the request ended, once it has."""
        for record in records:
            self.last = record.sequence
            frames = record.frames if self._wanted else record.frames[-1:]
            for encoded in frames:
                frame = decode_frame(encoded)
                if self._wanted:
                    self.answer.receive(frame)
            if isinstance(frame, Completed | Failed):
                # Unless it is whole: the oldest records reach RESPONSE_TTL first.
                self.answer.fail(RequestNotFound("the beginning of the answer is not stored any more", code=None))
                return outcome_of(frame)
        return None
