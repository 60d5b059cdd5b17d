"""HTTP to one inference server."""

import asyncio
import errno
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, Final

import aiohttp
import orjson

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 10.0
# Shorter than the time after which servers close an idle connection: 5 s with uvicorn and llama.cpp.
_KEEP_ALIVE_S: Final = 3.0
_END_S: Final = 1.0
"""Time between the last event of an answer and its end. After it, the connection is closed."""
_MAX_EVENT_BYTES: Final = 16 << 20
_MAX_ANSWER_BYTES: Final = 256 << 20
"""The log probabilities of a long prompt take tens of megabytes."""
_BROKEN: Final = (aiohttp.ClientError, OSError, RuntimeError)
"""What the client raises of a connection that ended; the last where this side has closed it."""


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a schema may have integers of more than 64 bits
        return json.dumps(body).encode()


class ServerFailed(Exception):
    """The server broke off, or answered with an error: `status`, None without an answer. The message quotes no request.

    `detail` is the server's own message, which may.
    """

    def __init__(self, message: str, status: int | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class ServerGone(ServerFailed):
    """Nothing listens at the address."""


class Http:
    """Asks the server at `url`, over kept connections. `key` is sent as a bearer token.

    Servers close kept connections without a word. A request on one that fails before a byte of its answer has come is
    sent again on a new connection.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        # Compression would hold tokens back, and a proxy of the environment is not meant for a server on this machine.
        options: dict[str, Any] = {"timeout": timeout, "headers": headers | {"Accept-Encoding": "identity"}}
        # What was not asked for may be of any size once it is unpacked.
        options["auto_decompress"] = False
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        fresh = aiohttp.TCPConnector(limit=0, force_close=True)
        self._kept = aiohttp.ClientSession(connector=kept, **options)
        self._fresh = aiohttp.ClientSession(connector=fresh, **options)

    async def get(self, path: str) -> bytes:
        """The body of an answer, within 10 s; raises ServerFailed, also for one larger than 256 MiB."""
        return await self._whole("GET", path, None)

    async def json(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = _ANSWER_S) -> Any:
        """The answer to a GET or, with `body`, a POST, within `timeout_s` (None: however long); raises ServerFailed."""
        answer = await self._whole("GET" if body is None else "POST", path, body, timeout_s)
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError as exc:
            raise ServerFailed(f"the answer to {path} is no JSON", 200) from exc

    async def events(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Any, None]:
        """The JSON of each server-sent event that answers a POST, until `[DONE]` or the end of the answer.

        Closing the generator closes the connection, if the answer has not ended.

        Raises:
            ServerFailed: also for an event that is no JSON, or larger than 16 MiB.
        """
        response = await self._send("POST", path, body, headers)
        rest = b""
        try:
            await _check(response, path)
            async for part in response.content.iter_any():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line[:5] == b"data:":
                        if (data := line[5:].strip()) == b"[DONE]":
                            with suppress(TimeoutError):
                                await asyncio.wait_for(_pass(response), _END_S)
                            return
                        yield orjson.loads(data)
                if len(rest) > _MAX_EVENT_BYTES:
                    raise ServerFailed(f"an event of {path} is larger than {_MAX_EVENT_BYTES} bytes")
        except orjson.JSONDecodeError as exc:
            raise ServerFailed(f"an event of {path} is no JSON") from exc
        except _BROKEN as exc:
            raise ServerFailed(f"the answer to {path} broke off: {type(exc).__name__}") from exc
        finally:
            # Does nothing to an answer that was read to its end: its connection is kept.
            response.close()

    async def close(self) -> None:
        """Close all connections; what still runs fails."""
        await self._kept.close()
        await self._fresh.close()

    async def _whole(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = _ANSWER_S
    ) -> bytes:
        try:
            async with asyncio.timeout(timeout_s), await self._send(method, path, body) as response:
                await _check(response, path)
                return await _read(response, path)
        except TimeoutError as exc:
            raise ServerFailed(f"no answer to {path} in {timeout_s:g} s") from exc
        except _BROKEN as exc:
            raise ServerFailed(f"the answer to {path} broke off: {type(exc).__name__}") from exc

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """The head of the answer."""
        data = None if body is None else _encoded(body)
        # A redirection would send the prompt to another server than the one that the operator has named.
        options: dict[str, Any] = {"allow_redirects": False}
        if data:
            options |= {"data": data, "headers": {"Content-Type": "application/json", **(headers or {})}}
        for session in (self._kept, self._fresh):
            try:
                return await session.request(method, self.url + path, **options)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE):
                    raise ServerFailed("this process has too many connections") from exc
                raise ServerGone(f"nothing answers at {self.url}") from exc
            except (aiohttp.ClientError, OSError) as exc:
                if session is self._fresh:
                    raise ServerFailed(f"no answer to {path}: {type(exc).__name__}") from exc
            except RuntimeError as exc:  # the session is closed
                raise ServerFailed("the connection was closed") from exc
        raise AssertionError


async def _check(response: aiohttp.ClientResponse, path: str) -> None:
    if response.status >= 300:
        detail = (await response.content.read(2000)).decode(errors="replace")
        hint = ": ENGINE_API_KEY is not its key" if response.status in (401, 403) else ""
        if response.status < 400:
            hint = ": it leads elsewhere, which is not followed"
        raise ServerFailed(f"{path} was answered with status {response.status}{hint}", response.status, detail)


async def _read(response: aiohttp.ClientResponse, path: str) -> bytes:
    """The body."""
    whole = bytearray()
    async for part in response.content.iter_any():
        whole += part
        if len(whole) > _MAX_ANSWER_BYTES:
            raise ServerFailed(f"the answer to {path} is larger than {_MAX_ANSWER_BYTES} bytes")
    return bytes(whole)


async def _pass(response: aiohttp.ClientResponse) -> None:
    """Read what is left of the body, which nobody needs."""
    async for _ in response.content.iter_any():
        pass
