"""The body of `POST /v1/batches`."""

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator

from forebay_api.openai.body import Metadata, StrictModel
from forebay_api.openai.files.upload import ExpiresAfter
from forebay_contracts.nats.streams import MAX_BATCH_S

MIN_WINDOW_S: Final = 3_600
"""The shortest completion window."""

_WINDOW: Final = re.compile(r"(\d{1,4})(h|d)")


def window_s(text: str) -> int:
    """A completion window like `24h` or `7d` in seconds. Raises ValueError."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * (3_600 if found[2] == "h" else 86_400) if found else 0
    if not MIN_WINDOW_S <= seconds <= MAX_BATCH_S:
        raise ValueError("a window is like `24h` or `2d`, from `1h` to `7d`")
    return seconds


def _checked(text: str) -> str:
    window_s(text)
    return text


class BatchBody(StrictModel):
    """A new batch."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Annotated[str, AfterValidator(_checked)]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
