"""uvicorn's HTTP on httptools, with bounds on what a client sends before there is a request to answer.

httptools accepts headers without an end, and uvicorn waits for them without a timeout. uvicorn also writes an answer in
pieces, each of them a system call and a packet; here they leave together.
"""

import json
from asyncio import AbstractEventLoop, TimerHandle, Transport
from typing import Any, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from forebay_api.http import websocket
from forebay_api.http.peer import Peer
from forebay_contracts.wire.errors import InvalidRequest

MAX_HEAD_BYTES: Final = 32 * 1024
"""Largest request line and headers together; more gets 431."""

MAX_HEADERS: Final = 100

LARGE_PIECE: Final = 16 * 1024
"""Bytes of a piece of a body that the application is not woken for, unless it is the last."""

GATHERED_BYTES: Final = 1024 * 1024
"""With more of a body than this, the application is woken, and nothing is read before it has taken it."""

HEAD_TIMEOUT_S: Final = 10.0
"""Time for a request's line and headers, from its first byte or from the connection on."""


class GatheringTransport:
    """Writes at once what one turn of the event loop has for a connection: head and body, many tokens of a stream."""

    __slots__ = ("_loop", "_parts", "_transport")

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] | None = None

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport; written at the end of this turn."""
        if self._parts is None:
            self._parts = [data]
            self._loop.call_soon(self._flush)
        else:
            self._parts.append(data)

    def close(self) -> None:
        """See asyncio.BaseTransport: what was written before is sent."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        parts, self._parts = self._parts, None
        if parts is not None and not self._transport.is_closing():
            self._transport.writelines(parts)


class BoundedHttp(HttpToolsProtocol):
    """One connection. A request that exceeds a bound or is not HTTP is answered 431, 408 or 400, and closes it."""

    # Without slots these attributes would double the memory of the connection's own.
    __slots__ = (
        *("_body_timeout_s", "_head_bytes", "_in_body", "_peer", "_refused", "_silent_bytes", "_timed_bytes", "_timer"),
    )

    def __init__(self, *args: Any, body_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._body_timeout_s = body_timeout_s
        self._timer: TimerHandle | None = None
        self._in_body = False
        self._head_bytes = 0
        self._silent_bytes = 0
        self._timed_bytes = 0
        self._refused = False
        self._peer = Peer()

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(GatheringTransport(transport, self.loop))  # type: ignore[arg-type]
        self._arm(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._disarm()
        super().connection_lost(exc)
        self._peer.leave()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refused:
            return
        # Bytes since the last whole head or piece of body. httptools keeps them all.
        self._silent_bytes += len(data)
        if self._timer is None:
            self._arm(HEAD_TIMEOUT_S)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as exc:
            if self._should_upgrade():
                self._become_websocket()
            else:
                self._ignore_upgrade(data[exc.args[0] :])
        except HttpParserError:
            self._refuse(400, "the request is not valid HTTP")
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "the request's headers are too large")

    def _should_upgrade(self) -> bool:
        return (
            self.url.partition(b"?")[0] in websocket.PATHS
            and self.parser.get_method() == b"GET"
            and not self._refused
            and not self._answers_before()
            and (self.limit_concurrency is None or len(self.connections) < self.limit_concurrency)
            and super()._should_upgrade()
        )

    def _become_websocket(self) -> None:
        self._disarm()
        self.scope["method"] = "GET"
        self.handle_websocket_upgrade()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the request again without its `Upgrade` header, as RFC 9110 7.8 allows.

        httptools ends a request that has one after its headers, and `rest`, its body, would be lost.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "CONNECT is not supported")
            return
        head = b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.data_received(b"".join((head, *lines, b"\r\n", rest)))

    def on_message_begin(self) -> None:
        """A request begins."""
        self._head_bytes = 0
        super().on_message_begin()
        self._peer.extend(self.scope)  # type: ignore[arg-type]

    def on_url(self, url: bytes) -> None:
        """A piece of its address."""
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind a body in chunks."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refuse(431, "the request's headers are too large or too many")
        elif not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there: the application begins."""
        if self._refused or self.parser.should_upgrade():
            return
        self._silent_bytes = self._timed_bytes = 0
        self._arm(self._body_timeout_s)
        super().on_headers_complete()
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body.

        To wake the application for each piece takes as long as to copy it. A body without a length wakes it for each,
        since it may be too large. Each megabyte of a file has as long as a body.
        """
        self._silent_bytes = 0
        if self._refused:
            return
        self._timed_bytes += len(body)
        if self._timed_bytes > GATHERED_BYTES:
            self._timed_bytes = 0
            self._arm(self._body_timeout_s)
        if len(body) >= LARGE_PIECE and self._is_gathered():
            self.cycle.body += body
        else:
            super().on_body(body)

    def _is_gathered(self) -> bool:
        if self.cycle.response_complete or len(self.cycle.body) >= GATHERED_BYTES:
            return False
        return any(name == b"content-length" for name, _ in self.headers)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        self._silent_bytes = 0
        self._in_body = False
        self._disarm()
        if not self._refused:
            super().on_message_complete()
            if not self.pipeline:
                # A connection that nobody reads does not tell that the client has left.
                self.flow.resume_reading()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        if self._answers_before():
            # The client waits for the answer to its request before.
            self._arm(HEAD_TIMEOUT_S)
        else:
            self._refuse(408, "the request did not arrive in time")

    def _answers_before(self) -> bool:
        """Whether an earlier request of the connection is still being answered."""
        if self._in_body:
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and close. Whole requests before get their answers first."""
        if self._refused:
            return
        self._refused = True
        self._disarm()
        if self.transport.is_closing():
            return
        if self._answers_before() and not self._in_body:
            self.cycle.keep_alive = False
            return
        answered = self._in_body and self.cycle.response_started
        if not answered and not self._answers_before():
            body = json.dumps(InvalidRequest(message).body()).encode()
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nx-content-type-options: nosniff\r\nx-should-retry: false\r\n"
                + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()
