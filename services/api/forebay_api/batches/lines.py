"""The lines of a batch's input file: read one by one, and checked as OpenAI checks them.

Source: https://platform.openai.com/docs/guides/batch.
"""

import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

import orjson

from forebay_api.http.bodies import off_loop, validated
from forebay_api.openai.body import RequestBody
from forebay_api.routes import ENDPOINTS, Endpoint
from forebay_contracts.wire.errors import ApiError, InvalidRequest

MAX_LINES: Final = 50_000
"""Most requests of a batch."""

ENVELOPE_BYTES: Final = 4_096
"""How much larger than the body of a request its line may be."""

BY_PATH: Final = {endpoint.path: endpoint for endpoint in ENDPOINTS}


class WrongLine(Exception):
    """A line that is no request of the batch. `custom_id` None: it has none."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class Line(NamedTuple):
    """A request of a batch, before its body is validated."""

    custom_id: str
    body: bytes


async def read(content: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[tuple[int, bytes | None]]:
    """The lines that are not empty, with their numbers from 1; None for one larger than `max_bytes`.

    Holds one chunk of the file and one line.
    """
    held, too_long, number = bytearray(), False, 0
    async for chunk in content:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            whole = bytes(held) + part if held else part
            held.clear()
            if too_long or whole.strip():
                number += 1
                yield number, None if too_long or len(whole) > max_bytes else whole
            too_long = False
        held += rest
        if len(held) > max_bytes:
            held.clear()
            too_long = True
    if too_long or held.strip():
        yield number + 1, None if too_long else bytes(held)


def parsed(data: bytes | None, url: str) -> Line:
    """The request of a line. Raises WrongLine."""
    if data is None:
        raise WrongLine("request_too_large", "The line is too long.")
    try:
        found = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:
        raise WrongLine("invalid_json_line", "This line is not parseable as valid JSON.") from None
    if not isinstance(found, dict):
        raise WrongLine("invalid_json_line", "This line is no JSON object.")
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise WrongLine("missing_required_parameter", "Missing required parameter: 'custom_id', a string.")
    if found.get("method") != "POST":
        raise WrongLine("invalid_method", "The method of each request must be 'POST'.", custom_id)
    if found.get("url") != url:
        raise WrongLine("invalid_url", f"The URL of each request must be that of the batch, '{url}'.", custom_id)
    body = found.get("body")
    if not isinstance(body, dict):
        raise WrongLine("missing_required_parameter", "Missing required parameter: 'body', an object.", custom_id)
    try:
        return Line(custom_id, orjson.dumps(body))
    except orjson.JSONEncodeError:
        raise WrongLine("invalid_json_line", "The body is nested too deeply.", custom_id) from None


class Uniqueness:
    """Tells a `custom_id` that was there before. Keeps 8 bytes of a hash of each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def check(self, custom_id: str) -> None:
        """Raises WrongLine."""
        digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8).digest()
        if digest in self._seen:
            raise WrongLine("duplicate_custom_id", "The custom_id of each request must be unique.", custom_id)
        self._seen.add(digest)


async def valid_body(endpoint: Endpoint, data: bytes, max_bytes: int) -> Any:
    """The body of a line, by the schema of its endpoint. Raises ApiError."""
    if len(data) > max_bytes:
        raise InvalidRequest(f"the body is larger than {max_bytes} bytes", code="request_too_large")
    body: RequestBody = await off_loop(len(data), validated, endpoint.body, data)
    for name in ("stream", "background"):
        if getattr(body, name, False):
            raise InvalidRequest(f"A request of a batch has no '{name}'.", param=name)
    if "store" in body.model_fields_set and getattr(body, "store", False):
        raise InvalidRequest("A request of a batch is not stored: its answer is in the output file.", param="store")
    return body.model_copy(update={"store": False}) if hasattr(body, "store") else body


def error_line(record_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """The line of a request that was not run."""
    error = {"code": code, "message": message}
    return _written(record_id, custom_id, None, error)


def answer_line(request_id: str, custom_id: str, status: int, body: Any) -> bytes:
    """The line of a request that was run, or whose body is wrong. `body`: an object, or orjson.Fragment."""
    return _written(request_id, custom_id, {"status_code": status, "request_id": request_id, "body": body}, None)


def failure_line(request_id: str, custom_id: str, endpoint: Endpoint, error: ApiError) -> bytes:
    """The line of a request that ended with an error."""
    status, body = endpoint.errors.write(error, request_id)
    return answer_line(request_id, custom_id, status, body)


def _written(request_id: str, custom_id: str | None, response: Any, error: Any) -> bytes:
    identifier = f"batch_req_{request_id.replace('-', '')}"
    line = {"id": identifier, "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(line) + b"\n"
