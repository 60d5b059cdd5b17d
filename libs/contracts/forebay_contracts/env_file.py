"""The file `.env` of the working directory."""

from pathlib import Path
from typing import Final

from forebay_contracts.wire.errors import ConfigurationError

ENV_FILE: Final = ".env"
ENCODING: Final = "utf-8-sig"
"""UTF-8, with or without the mark at the start that editors on Windows write."""


def check() -> None:
    """Raise ConfigurationError where `.env` is there and no text: its settings would be left out without a word."""
    path = Path(ENV_FILE)
    try:
        # A folder of this name may be a virtual environment.
        if path.is_file() and "\0" in path.read_text(ENCODING):
            raise ConfigurationError(f"{path.absolute()} is no text in UTF-8: save it as UTF-8")
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path.absolute()} is no text in UTF-8 ({exc.reason}): save it as UTF-8") from exc
    except OSError as exc:
        raise ConfigurationError(f"{path.absolute()} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
