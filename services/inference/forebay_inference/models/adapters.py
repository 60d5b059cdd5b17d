"""LoRA adapters, of MODEL_ADAPTERS: from the place that an operator names to a local file or folder."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Literal

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.models.hub import Read, download_from_hub
from forebay_inference.models.store import ensure_gguf

_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
"""Of PEFT. Weights in a `.bin` file could contain code, and are not fetched."""

Kind = Literal["gguf", "checkpoint"]


def ensure_adapters(settings: InferenceSettings, kind: Kind, progress: Callable[[str], None]) -> dict[str, Path]:
    """Each adapter by its name: its GGUF file, or its folder, fetched first where needed; blocks until all are there.

    Raises:
        ConfigurationError: there is no such adapter, or nothing that could be fetched under that name.
    """
    found = {}
    for name, place in settings.model_adapters.items():
        try:
            found[name] = _ensured(place, settings, kind, progress)
        except ConfigurationError as exc:
            raise ConfigurationError(f"MODEL_ADAPTERS: {name}={str(exc).removeprefix('DEFAULT_MODEL=')}") from exc
    return found


def _ensured(place: str, settings: InferenceSettings, kind: Kind, progress: Callable[[str], None]) -> Path:
    if kind == "gguf":
        return ensure_gguf(place, settings.data_dir, progress, settings.hf_token)
    if (folder := Path(place).expanduser()).is_dir():
        _adapter_files({path.name for path in folder.iterdir()}, lambda name: b"")
        return folder
    token = None if settings.hf_token is None else settings.hf_token.get_secret_value()
    return download_from_hub(place, settings.data_dir / "hub", progress, token, _adapter_files)


def _adapter_files(names: Collection[str], read: Read) -> list[str]:
    if missing := set(_FILES).difference(names):
        raise ConfigurationError(f"no LoRA adapter of PEFT: there is no {' and no '.join(sorted(missing))}")
    return list(_FILES)


def rank_of(folder: Path) -> int:
    """The rank of the adapter in `folder`; raises ConfigurationError if it does not tell."""
    file = folder / _FILES[0]
    try:
        config = json.loads(file.read_bytes())
        return max(map(int, (config["r"], *config.get("rank_pattern", {}).values())))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{file} tells no rank: {exc!r}") from exc
