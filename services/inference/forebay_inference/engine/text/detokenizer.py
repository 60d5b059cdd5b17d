"""From tokens to text that may be shown: whole characters only, and never a part of a stop string.

Everything here is a pure function of the tokens pushed so far, however they were grouped, so that an answer
that is taken up again on another worker goes on without a seam.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

REPLACEMENT: Final = "\ufffd"
# A character is at most four bytes, so at most three of them wait for the rest of it.
_MAX_INCOMPLETE = 3
_CACHED_PAIRS = 16_384


class Decoder:
    """Decodes for many detokenizers. `decode` maps token ids to text, with U+FFFD where bytes make no character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        # Two calls of a tokenizer take 5 µs a token, a hit of this cache 0.1.
        self.after = lru_cache(_CACHED_PAIRS)(self._after)

    def _after(self, previous: int | None, token: int) -> str:
        """The text of `token` behind the settled token `previous`; empty unless later tokens cannot change it."""
        if previous is None:
            text = self.decode([token])
        else:
            text = self.decode([previous, token])[len(self.decode([previous])) :]
        return "" if text.endswith(REPLACEMENT) else text


class Detokenizer:
    """Turns tokens into text, one by one.

    Text is handed out once later tokens cannot change it: all but the (at most three) replacement characters
    at the end, which may be the beginning of a character.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._decode = decoder.decode
        # Between characters the last token is context for the next: some decoders treat the first token of a text in
        # their own way. Within a character there is a window: tokens of context, then those of the character, and
        # how much of the window's text was handed out.
        self._previous: int | None = None
        self._window: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` settles; may be empty."""
        if not self._window:
            settled = self._decoder.after(self._previous, token)
            if settled:
                self._previous = token
                return settled
            self._open([] if self._previous is None else [self._previous])
        self._window.append(token)
        text = self._decode(self._window)
        stable = len(text)
        while stable > 0 and len(text) - stable < _MAX_INCOMPLETE and text[stable - 1] == REPLACEMENT:
            stable -= 1
        settled = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if stable == len(text) and settled:
            self._open(self._window[self._context :])
            if self._context == 1:
                self._previous, self._window = token, []
        return settled

    def _open(self, context: list[int]) -> None:
        self._window, self._context = context, len(context)
        self._shown = len(self._decode(context)) if context else 0

    def flush(self) -> str:
        """What is left at the end: characters that were never completed, as U+FFFD."""
        rest = self._decode(self._window)[self._shown :] if self._window else ""
        self._previous, self._window = None, []
        return rest


class StopStrings:
    """Cuts a text before the stop string that is complete first, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops: Final = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None

    @property
    def any(self) -> bool:
        """Whether there are stop strings."""
        return bool(self._stops)

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown and was not yet; sets `matched` when it is at its end."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = self._first_match()
        if found is not None:
            start, self.matched = found
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._possible_start()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _first_match(self) -> tuple[int, str] | None:
        # The match that ends first, as if the text had come character by character; of two, the longer.
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _possible_start(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        beginnings = (stop[:length] for stop in self._stops for length in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)
