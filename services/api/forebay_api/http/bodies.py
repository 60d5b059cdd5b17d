"""Reading a body: bounded before it is read whole, and a fault in it told as OpenAI tells it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from forebay_api.in_flight.answer import ClientLeft
from forebay_api.openai.body import Misfit
from forebay_contracts.wire.errors import InvalidRequest, RequestTooLarge

LARGE_BYTES: Final = 16 * 1024
"""More takes milliseconds to validate or to write, which is done beside the event loop. Less does not add up much:
a hundred such bodies at once hold it for 0.2 s."""

Body = TypeVar("Body", bound=BaseModel)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# The event loop shares the interpreter with it. More threads would leave the loop a smaller share.
_thread: Final = ThreadPoolExecutor(1, "large-bodies")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body as it came.

    Raises:
        RequestTooLarge: larger than `max_bytes`; not read any further.
        ClientLeft: the client closed the connection while sending.
    """
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    data: bytes | bytearray = b""
    try:
        async for piece in request.stream():
            if not data:
                data = piece  # in most cases it is all, and bytes() below makes no copy
            elif piece:
                data = bytearray(data) if isinstance(data, bytes) else data
                data += piece
            if len(data) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as exc:
        raise ClientLeft("the client left while sending") from exc
    return bytes(data)


async def body_of(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The body of a request that is not queued; without any, an empty object. Raises as `read_body` and `validated`."""
    data = await read_body(request, max_bytes)
    return await off_loop(len(data), validated, kind, data or b"{}")


async def off_loop(
    size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The result of `work` on `size` bytes. It runs in a thread if that takes milliseconds."""
    if size <= LARGE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, partial(work, *args, **kwargs))


def validated(kind: type[Body], data: bytes) -> Body:
    """The body. Raises InvalidRequest if it is not JSON, or not a body of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as exc:
        raise _invalid(exc, data) from exc
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes")


def _invalid(exc: ValidationError, data: bytes) -> InvalidRequest:
    errors = exc.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return InvalidRequest(f"We could not parse the JSON body of your request: {_reason(errors[0])}")
    body = from_json(data)
    faults = [(_path(error, body), error) for error in errors]
    # Each member of a union reports a fault. The client meant the member that got furthest, or of several the one that
    # found the right type.
    path, first = max(faults, key=lambda fault: (len(fault[0]), not _is_type(fault[1])))
    param = _written(path) or None
    code, what = _code(first)
    where = f" '{param}'" if param else ""
    match code:
        case "missing_required_parameter":
            message = f"Missing required parameter:{where}."
        case "unknown_parameter":
            message = f"Unrecognized request argument supplied: {param}"
        case "invalid_type":
            wanted = dict.fromkeys(_reason(error) for other, error in faults if other == path and _is_type(error))
            message = f"Invalid type{' for' if param else ''}{where}: expected {' or '.join(wanted)}."
        case _:
            message = f"Invalid{where}: {what}."
    return InvalidRequest(message, param=param, code=code)


def _path(error: ErrorDetails, body: object) -> tuple[str | int, ...]:
    """Where in the body the fault is, without the members of unions that Pydantic names on the way."""
    missing = error["type"] == "missing"
    path: list[str | int] = []
    node: Any = body
    for part in error["loc"][:-1] if missing else error["loc"]:
        is_index = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_index or (isinstance(node, dict) and part in node):
            path.append(part)
            node = node[part]
    if missing:
        path.append(error["loc"][-1])
    if (discriminator := error.get("ctx", {}).get("discriminator", "")).startswith("'"):
        path.append(discriminator.strip("'"))
    misfit = error.get("ctx", {}).get("error")
    if isinstance(misfit, Misfit):
        path.append(misfit.param)
    return tuple(path)


def _written(path: tuple[str | int, ...]) -> str:
    """A path as OpenAI writes it: `messages[0].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _is_type(error: ErrorDetails) -> bool:
    return error["type"].endswith(("_type", "_parsing", "_from_float"))


def _reason(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Invalid JSON: ").removeprefix("Value error, ").removeprefix("Input should be ")


def _code(error: ErrorDetails) -> tuple[str, str]:
    """OpenAI's code for a fault, and what is wrong in words."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "missing_required_parameter", ""
        case "extra_forbidden":
            return "unknown_parameter", ""
        case "greater_than_equal" | "greater_than":
            return f"{_number(limits)}_below_min_value", f"expected a value {_reason(error)}"
        case "less_than_equal" | "less_than":
            return f"{_number(limits)}_above_max_value", f"expected a value {_reason(error)}"
        case "too_short":
            return "empty_array", "expected an array with at least one element"
        case "too_long":
            return "array_above_max_length", f"expected an array with at most {limits['max_length']} elements"
        case "string_too_short":
            return "empty_string", "expected a string with at least one character"
        case "string_too_long":
            return "string_above_max_length", f"expected a string with at most {limits['max_length']} characters"
        case "literal_error" if limits["expected"] in ("True", "False"):
            return "invalid_value", f"expected {limits['expected'].lower()}"
        case "literal_error" | "finite_number" | "none_required":
            return "invalid_value", f"expected {_reason(error)}"
        case "union_tag_invalid":
            return "invalid_value", f"{limits['tag']!r} is none of {limits['expected_tags']}"
        case "union_tag_not_found":
            return "missing_required_parameter", ""
    return ("invalid_type" if _is_type(error) else "invalid_value"), _reason(error)


def _number(limits: dict[str, Any]) -> str:
    return "integer" if all(isinstance(limit, int) for limit in limits.values()) else "decimal"
