"""Log probabilities as a client gets them: with the text and the bytes of their tokens."""

from collections.abc import Callable
from typing import Any

from forebay_contracts.wire import frames
from forebay_inference.engine.protocol import TokenLogprob
from forebay_inference.engine.text.detokenizer import REPLACEMENT, Decoder


def with_text(
    entry: TokenLogprob, decoder: Decoder, bytes_of: Callable[[int], bytes], *, first: bool = False, given: str = ""
) -> frames.TokenLogprob:
    """`entry` with the text of its tokens within a text or, with `first`, at its beginning.

    A special token has no text, unless it is an alternative or stands in the prompt `given`.
    """

    def described(token: int, *, hidden: bool) -> dict[str, Any]:
        text = decoder.decode([token]) if first else decoder.piece(token)
        if not text and (special := bytes_of(token).decode(errors="replace")) and (not hidden or special in given):
            text = special
        raw = tuple(bytes_of(token)) if REPLACEMENT in text else None
        return {"token": token, "text": text, "raw": raw}

    top = tuple(frames.TopLogprob(logprob=value, **described(token, hidden=False)) for token, value in entry.top)
    chosen = described(entry.token, hidden=True)
    return frames.TokenLogprob(logprob=entry.logprob, rank=entry.rank, top=top, **chosen)
