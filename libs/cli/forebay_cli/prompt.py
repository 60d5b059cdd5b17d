"""Reads the messages of a conversation, from a person at a terminal or from a pipe."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from forebay_cli import console

PROMPT: Final = "> "


def reader(history: Path) -> Callable[[], str]:
    """A function that reads the next message; it raises EOFError at the end, and KeyboardInterrupt on Ctrl-C.

    At a terminal a person can edit it, go back to earlier ones, which the file `history` keeps, and paste several lines
    as one message.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: input(PROMPT)
    try:
        # Imported here, since it takes 0.1 s.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ModuleNotFoundError:
        console.say("for history and editing: pip install 'forebay[chat]'")
        return lambda: input(PROMPT)
    history.parent.mkdir(parents=True, exist_ok=True)
    history.touch(mode=0o600)
    read: Callable[[], str] = PromptSession(PROMPT, history=FileHistory(str(history))).prompt
    return read
