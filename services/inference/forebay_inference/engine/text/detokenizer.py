"""From tokens to text that may be shown: whole characters only, and never a part of a stop string.

Everything here is a pure function of the tokens pushed so far, however they were grouped, so that an answer
that is taken up again on another worker goes on without a seam.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

REPLACEMENT: Final = "\ufffd"
# A character is at most four bytes, so at most three of them wait for the rest of it.
_MAX_INCOMPLETE = 3
# Some decoders make U+FFFD of every byte of a run until all its characters are whole. Garbage is shown after so many.
_MAX_HELD_TOKENS = 16
_CACHED = 16_384


class Decoder:
    """Decodes for many detokenizers. `decode` maps token ids to text, with U+FFFD where bytes make no character.

    `anchor` are the tokens of a text that ends with a letter.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], anchor: Sequence[int] = ()) -> None:
        self.decode = decode
        self._anchor = tuple(anchor)
        self._anchor_text = decode(anchor) if anchor else ""
        # Two calls of a tokenizer take 5 µs a token, a hit of these caches 0.1.
        self.after = lru_cache(_CACHED)(self._after)
        self.piece = lru_cache(_CACHED)(self._piece)

    def _after(self, previous: int | None, token: int) -> str:
        """The text of `token` behind the settled token `previous`; empty unless later tokens cannot change it."""
        if previous is None:
            text = self.decode([token])
        else:
            text = self.decode([previous, token])[len(self.decode([previous])) :]
        return "" if text.endswith(REPLACEMENT) else text

    def _piece(self, token: int) -> str:
        """The text of `token` within a text. At the beginning of a text, some decoders take its space away."""
        return self.decode([*self._anchor, token])[len(self._anchor_text) :]

    def context(self, tokens: Sequence[int], *, whole: bool) -> "Context":
        """What a detokenizer has to know of `tokens`, to go on after them. `whole`: their last character is."""
        pending = 0 if whole else next((n for n in range(_MAX_INCOMPLETE + 1) if self._is_whole(tokens, n)), 0)
        end, length = len(tokens) - pending, 1
        while length < end and self.decode(tokens[end - length : end])[:1] in ("", REPLACEMENT):
            length *= 2
        return Context(tuple(tokens[max(0, end - length) : end]), tuple(tokens[end:]))

    def _is_whole(self, tokens: Sequence[int], without: int) -> bool:
        end = len(tokens) - without
        return not self.decode(tokens[max(0, end - _MAX_HELD_TOKENS) : end]).endswith(REPLACEMENT)


class Context(NamedTuple):
    """The last tokens before an answer: `shown` begin with a visible character, `pending` belong to one that is not
    whole."""

    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()


class Detokenizer:
    """Turns tokens into text, one by one, that goes on after `context`.

    Text is handed out once later tokens cannot change it: all but the replacement characters at the end, which may be
    the beginning of a character.
    """

    def __init__(self, decoder: Decoder, context: Context | None = None) -> None:
        self._decoder = decoder
        self._decode = decoder.decode
        # Between characters the last token is context for the next: some decoders treat the first token of a text in
        # their own way. Within a character there is a window: tokens of context, then those of the character, and
        # how much of the latters' text was handed out.
        self._previous: int | None = None
        self._window: list[int] = []
        self._context = 0
        self._before = ""
        self._shown = 0
        if context is not None:
            shown, pending = context
            if len(shown) == 1 and not pending:
                self._previous = shown[0]
            else:
                self._open(list(shown))
                self._window += pending

    def push(self, token: int) -> str:
        """The text that `token` settles; may be empty."""
        if not self._window:
            settled = self._decoder.after(self._previous, token)
            if settled:
                self._previous = token
                return settled
            self._open([] if self._previous is None else [self._previous])
        self._window.append(token)
        text = self._text()
        stable = text.rstrip(REPLACEMENT)
        if len(self._window) - self._context > _MAX_HELD_TOKENS:
            stable = text[: max(len(stable), len(text) - _MAX_INCOMPLETE)]
        settled, self._shown = stable[self._shown :], max(self._shown, len(stable))
        if settled and len(stable) == len(text):
            if len(self._window) - self._context == 1:
                self._previous, self._window = token, []
            else:
                self._open(self._window[self._context :])
        return settled

    def _open(self, context: list[int]) -> None:
        self._window, self._context, self._shown = context, len(context), 0
        self._before = self._decode(context) if context else ""

    def _text(self) -> str:
        """The text of the window behind its context."""
        text = self._decode(self._window)
        if text.startswith(self._before):
            return text[len(self._before) :]
        # A decoder that takes back the characters of a run of bytes: they were whole, and are shown.
        return self._decode(self._window[self._context :])

    def flush(self) -> str:
        """What is left at the end: characters that were never completed, as U+FFFD."""
        rest = self._text()[self._shown :] if self._window else ""
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
