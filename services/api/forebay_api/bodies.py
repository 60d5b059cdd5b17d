"""Reading a body: bounded before it is read whole, and a fault in it said as OpenAI says it."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from forebay_api.replies import ClientLeft
from forebay_contracts.errors import InvalidRequest, RequestTooLarge

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The validated body.

    Raises:
        RequestTooLarge: larger than `max_bytes`; not read any further.
        InvalidRequest: not JSON, or not a body of this kind.
        ClientLeft: the client closed the connection while sending.
    """
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as exc:
        raise ClientLeft("the client left while sending") from exc
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as exc:
        raise _invalid(exc) from exc
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes")


def _invalid(exc: ValidationError) -> InvalidRequest:
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    # Members of a union appear in `loc` by their type's name, which means nothing to a client.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(path) or None
    message = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return InvalidRequest(f"the body is not valid JSON: {message}", code="invalid_json")
        case "missing":
            return InvalidRequest(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        case "extra_forbidden":
            return InvalidRequest(
                f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
            )
    where = f"Invalid '{param}': " if param else ""
    return InvalidRequest(f"{where}{message}", param=param, code="invalid_value")
