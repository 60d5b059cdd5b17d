"""Compaction: all of a conversation but its users' and developers' messages becomes one item, which holds a summary.

`encrypted_content` of the item is the summary in base64. It is not encrypted: it holds nothing that its client has not
sent or received.
Source: https://platform.openai.com/docs/api-reference/responses/compact.
"""

import base64
from typing import Final

MAX_SUMMARY_TOKENS: Final = 2_048
"""Most tokens of a summary, its thoughts included."""

ASK: Final = (
    "Summarize the conversation so far, for an assistant who will go on with it and sees only the summary and my own"
    " messages. Keep every fact, decision, name, number and result of a tool, and say what is done and what is left to"
    " do. Write the summary and nothing else."
)

_FORM: Final = b"forebay-summary-1:"


def sealed(summary: str) -> str:
    """The `encrypted_content` that holds a summary."""
    return base64.urlsafe_b64encode(_FORM + summary.encode()).decode()


def opened(content: str) -> str:
    """The summary that an `encrypted_content` holds. Raises ValueError if it was not made by `sealed`."""
    found = base64.urlsafe_b64decode(content.encode())
    if not found.startswith(_FORM):
        raise ValueError("it is not of this service")
    return found.removeprefix(_FORM).decode()
