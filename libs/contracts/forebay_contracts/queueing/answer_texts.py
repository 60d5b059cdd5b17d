"""The text of a stored answer, for people who look at one."""

from forebay_contracts.queueing.protocols import AnswerLog
from forebay_contracts.wire.frames import Completed, Delta, decode_frame


async def answer_texts(answers: AnswerLog, request_id: str) -> list[str]:
    """The text so far of each choice. Raises QueueUnavailable."""
    texts: dict[int, str] = {}
    for record in await answers.read(request_id):
        for frame in map(decode_frame, record.frames):
            deltas = (frame,) if isinstance(frame, Delta) else frame.deltas if isinstance(frame, Completed) else ()
            for delta in deltas:
                texts[delta.index] = texts.get(delta.index, "") + delta.text
    return [texts[index] for index in sorted(texts)]
