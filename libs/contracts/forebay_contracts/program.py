"""The main function of a program: its standard streams take any text, and its errors are sentences on stderr."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any, Final

from forebay_contracts.wire.errors import ConfigurationError, ForebayError

EXIT_FAILED: Final = 1
EXIT_CONFIGURATION: Final = 2
EXIT_INTERRUPTED: Final = 130


def run(action: Callable[[], Any], fail: Callable[[str], None]) -> int:
    """Run `action`; returns the exit status. `fail` prints an error.

    Exit status 2: wrong configuration; 130: Ctrl-C; 1: any other failure, also that stdout cannot be written. Where
    nobody reads stdout any more, nothing is printed.
    """
    _settle_streams()
    code = _status(action, fail)
    for stream in (sys.stdout, sys.stderr):
        # What cannot be written now could not be written by the interpreter's own flush either.
        if written := _status(stream.flush, fail if stream is sys.stdout else lambda _: None):
            _discard(stream)
            code = code or (written if stream is sys.stdout else 0)
    return code


def _status(action: Callable[[], Any], fail: Callable[[str], None]) -> int:
    try:
        action()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else EXIT_FAILED if exc.code else 0
    except BrokenPipeError:
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ForebayError as exc:
        fail(str(exc))
        return EXIT_CONFIGURATION if isinstance(exc, ConfigurationError) else EXIT_FAILED
    except OSError as exc:
        fail(f"{exc.filename or 'input or output'}: {(exc.strerror or str(exc)).lower()}")
        return EXIT_FAILED
    except UnicodeError as exc:
        fail(f"this is no text in UTF-8: {exc}")
        return EXIT_FAILED
    return 0


def _settle_streams() -> None:
    """Open the standard streams that are closed, and have all of them take any character.

    A closed stream becomes /dev/null. Otherwise the next file or socket would get its descriptor. What an encoding
    cannot express is written as an escape. What cannot be decoded is read as U+FFFD.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest free descriptor is the stream's own.
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace" if mode == "r" else "backslashreplace")


def _discard(stream: Any) -> None:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
