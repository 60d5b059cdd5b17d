"""The `config.json` of a model on the model hub, without its weights."""

import os
from typing import Any, Final

import httpx
from pydantic import SecretStr

from forebay_contracts.wire.errors import ConfigurationError

_TIMEOUT_S: Final = 10
_HUB: Final = "https://huggingface.co"


def config_of_hub(model: str, token: SecretStr | None) -> dict[str, Any]:
    """The content of the `config.json` of hub id `model`, from the hub that HF_ENDPOINT names.

    Raises:
        ConfigurationError: the hub has none, does not give it, or cannot be reached.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}
    try:
        found = httpx.get(
            f"{endpoint.rstrip('/')}/{model}/resolve/main/config.json",
            headers=headers,
            timeout=_TIMEOUT_S,
            follow_redirects=True,
        )
        if found.status_code in (401, 403):
            raise ConfigurationError("the model hub does not give it without an HF_TOKEN that may read it")
        found.raise_for_status()
        config = found.json()
    except httpx.HTTPStatusError as exc:
        raise ConfigurationError(f"the model hub answers {exc.response.status_code}") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ConfigurationError(f"the model hub at {endpoint} cannot be reached ({type(exc).__name__})") from exc
    except ValueError as exc:
        raise ConfigurationError("the model hub gives no config.json that can be read") from exc
    if not isinstance(config, dict):
        raise ConfigurationError("the model hub gives no config.json that can be read")
    return config
