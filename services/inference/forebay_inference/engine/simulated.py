"""The simulated engine: `t0 t1 t2 …`, so that the queue can be tested and measured apart from a model."""

import asyncio
import hashlib
import math
import os
import re
import struct
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import (
    Capabilities,
    EngineFault,
    EngineStatus,
    LoadedModel,
    Step,
    TokenLogprob,
    TokenRequest,
)

_ORDERS = re.compile(r"\[\[([^\]]*)\]\]")
_PIECES = re.compile(r"\s*\S+(?:\s+\Z)?|\s+\Z")
_ORDER_VALUES: Final[Mapping[str, Callable[[str], Any]]] = {
    "tokens": int,
    "delay_ms": float,
    **dict.fromkeys(("fail", "crash", "random", "say"), lambda _: True),
}
_INSTRUCTIONS: Final = ("system", "developer")
_CONTEXT_LENGTH = 1 << 20
_DIMENSIONS = 64
_QUICK_LENGTH = 10_000
"""Characters of a prompt, or its tokens; more takes milliseconds."""
# From here on, a token is one byte of a text.
_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Orders:
    """What `[[tokens=20 delay_ms=50 fail crash]]` asks for: `tokens` how many, `delay_ms` before each,
    `fail` raises after them, `crash` ends the process there without a word. `random` draws the tokens from the
    request's seed; `say` answers with the text behind the orders, a byte a token."""

    tokens: int = 5
    delay_ms: float = 0
    fail: bool = False
    crash: bool = False
    random: bool = False
    say: bool = False

    def answer(self, text: str, seed: str) -> Sequence[int]:
        """The tokens of the whole answer to `text`."""
        if self.say:
            return [_BYTES + byte for byte in _ORDERS.split(text, 1)[2].encode()]
        if self.random:
            return [_draw(seed, place) for place in range(self.tokens)]
        return range(self.tokens)

    def end(self) -> None:
        """Do what is to be done after the answer."""
        if self.crash:
            os._exit(70)
        if self.fail:
            raise EngineFault("the simulated engine was ordered to fail")


def orders_in(text: str) -> Orders:
    """The orders in `text`; raises InvalidRequest for a word that is not one."""
    found = _ORDERS.search(text)
    return _orders("" if found is None else found.group(1))


@lru_cache(64)
def _orders(words: str) -> Orders:
    given = {}
    for word in words.split():
        name, _, value = word.partition("=")
        try:
            given[name] = _ORDER_VALUES[name](value)
        except (KeyError, ValueError):
            raise InvalidRequest(f"the simulated engine does not know the order {word!r}") from None
    return Orders(**given)


class SimulatedTokenizer:
    """Words of a prompt, with the white space around them, are negative ids that hold their bytes.

    Token k of an answer is `tk`; behind those stand the 256 single bytes.
    """

    vocabulary_size = _BYTES + 256
    begin_token: int | None = 0
    chat_template: str | None = "{{ messages[-1].content }}{# calls tools as <tool_call>, thinks in <think></think> #}"
    special_tokens: Mapping[str, int] = {}

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """See `Tokenizer.encode`; raises InvalidRequest for orders that make no sense."""
        orders_in(text)
        return [-int.from_bytes(b"\1" + piece.encode(errors="replace")) for piece in _PIECES.findall(text)]

    def decode(self, tokens: Sequence[int], *, show: Collection[int] = ()) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self.bytes_of, tokens)).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """See `Tokenizer.bytes_of`."""
        if token < 0:
            return (-token).to_bytes((token.bit_length() + 7) // 8)[1:]
        if token >= _BYTES:
            return bytes([token - _BYTES])
        return b" t%d" % token if token else b"t0"

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The instructions, whose orders do not count, and the last other message, which they may stand behind."""
        told = [one["content"].replace("[[", "[ [") for one in messages if one["role"] in _INSTRUCTIONS]
        said = [one["content"] or "" for one in messages if one["role"] not in _INSTRUCTIONS]
        return "\n\n".join([*told, said[-1]] if said else [messages[-1]["content"]]) or " "


class SimulatedEngine:
    """Obeys orders in the prompt; a lost or doubled token shows in its text. One engine, any concurrency.

    Sampling has no effect but for the seed of `random`, which an adapter changes; a grammar has none. An embedding is a
    function of its input alone, a unit vector.
    """

    capabilities = Capabilities(resumes="exact", grammars="ignored", logprobs=True, prompt_logprobs=True, adapters=True)

    def __init__(self, adapters: Iterable[str] = ()) -> None:
        self._adapters = frozenset(adapters)
        self._tokenizer = SimulatedTokenizer()
        self._running = 0
        self._steps = 0
        self._closed = False

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Nothing to load."""
        progress("simulated engine: nothing to load")
        return LoadedModel(
            self._tokenizer, _CONTEXT_LENGTH, "none", "none", quick_length=_QUICK_LENGTH, adapters=self._adapters
        )

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        """`t0 t1 …`, as ordered."""
        text = await self._text(request.prompt)
        orders, sampling = orders_in(text), request.sampling
        answer = orders.answer(text, (request.seed if sampling.temperature else "") + request.adapter)
        first, ends, count = len(request.generated), request.end_tokens, sampling.logprobs
        delay_s = orders.delay_ms / 1000
        self._running += 1
        try:
            for place in range(first, min(len(answer), first + request.max_new_tokens)):
                # Also without a delay: no engine keeps the event loop to itself.
                await asyncio.sleep(delay_s)
                if self._closed:
                    raise EngineFault("the engine was closed")
                self._steps += 1
                token = answer[place]
                yield _step(token) if count is None else Step((token,), _logprobs(request.seed, place, token, count))
                if token in ends:
                    yield Step((), finish="stop")
                    return
            orders.end()
            yield Step((), finish="stop" if len(answer) <= first + request.max_new_tokens else "length")
        finally:
            self._running -= 1

    async def score(
        self, id: str, prompt: Sequence[int], top: int, adapter: str = ""
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """A function of the tokens and their places."""
        for place, token in enumerate(prompt[1:], 1):
            await asyncio.sleep(0)
            yield (_logprobs(adapter, place, token, top)[0]._replace(rank=1),)

    async def embed(
        self, inputs: Mapping[int, Sequence[int]], dimensions: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """The vectors in turn; `tokens` in their orders means nothing."""
        self._running += len(inputs)
        try:
            for index, tokens in inputs.items():
                text = await self._text(tokens)
                orders = orders_in(text)
                await asyncio.sleep(orders.delay_ms / 1000)
                self._steps += 1
                orders.end()
                yield index, _vector(text, dimensions or _DIMENSIONS)
        finally:
            self._running -= len(inputs)

    async def rerank(
        self, query: str, documents: Mapping[int, str]
    ) -> AsyncGenerator[tuple[Mapping[int, float], int], None]:
        """The part of the query's words that a document has. It takes a token a word."""
        words = set(query.split())
        self._running += 1
        try:
            for index, text in documents.items():
                orders = orders_in(text)
                await asyncio.sleep(orders.delay_ms / 1000)
                self._steps += 1
                orders.end()
                yield {index: len(words.intersection(text.split())) / len(words or ".")}, len(f"{query} {text}".split())
        finally:
            self._running -= 1

    async def _text(self, prompt: Sequence[int]) -> str:
        decode = self._tokenizer.decode
        return decode(prompt) if len(prompt) < _QUICK_LENGTH else await asyncio.to_thread(decode, prompt)

    def status(self) -> EngineStatus:
        """Never broken."""
        return EngineStatus(None, self._running, self._steps)

    async def close(self) -> None:
        """Fail what still runs."""
        self._closed = True


@lru_cache(1024)
def _step(token: int) -> Step:
    return Step((token,))


def _draw(seed: str, place: int) -> int:
    """A number from 0 to 65,535 that depends on `seed` and `place` alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=2).digest())


def _logprobs(seed: str, place: int, token: int, count: int) -> tuple[TokenLogprob]:
    logprob = -_draw(seed, place) / 65_536
    return (TokenLogprob(token, logprob, tuple((token + by, logprob - by) for by in range(count))),)


def _vector(text: str, dimensions: int) -> bytes:
    numbers = hashlib.shake_128(text.encode()).digest(dimensions)
    values = [number - 127.5 for number in numbers]
    norm = math.hypot(*values)
    return struct.pack(f"<{dimensions}f", *(value / norm for value in values))
