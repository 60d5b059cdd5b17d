"""Settings from the environment and `.env`, without a prefix. Each service has one class.

Every setting is a field here and a line of `queue-config.env.example`. A test keeps both equal.
"""

from typing import Any, TypeVar

from pydantic import ValidationError

from forebay_contracts import env_file
from forebay_contracts.settings.api import ApiSettings
from forebay_contracts.settings.inference import InferenceSettings
from forebay_contracts.settings.shared import Settings
from forebay_contracts.wire.errors import ConfigurationError

__all__ = ["ApiSettings", "InferenceSettings", "Settings", "load"]

S = TypeVar("S", bound=Settings)


def load(cls: type[S], **overrides: Any) -> S:
    """Read the settings, and describe every error in one sentence.

    Raises:
        ConfigurationError: it names each wrong setting and says why.
    """
    try:
        env_file.check()
        return cls(**overrides)
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_sentence(error) for error in exc.errors())) from exc


def _sentence(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    return f"{str(error['loc'][0]).upper()}={error['input']!r}: {message}"
