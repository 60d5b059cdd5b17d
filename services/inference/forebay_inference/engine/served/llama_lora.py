"""How llama.cpp is asked for an answer with a LoRA adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forebay_contracts.wire.errors import ConfigurationError


def lora_fields(
    url: str, loaded: Sequence[Mapping[str, Any]], adapters: Mapping[str, Path], *, started: bool
) -> Mapping[str, Mapping[str, Any]]:
    """See `AdapterDialect.adapters`. The server at `url` tells which it has `loaded`, by their files.

    A request gives the scale of each, since the server applies the ones that it leaves out as it was started. A slot
    that changes its adapter forgets its prompt.

    Raises:
        ConfigurationError: it has none of a name, or several.
    """
    scales = {"": {one["id"]: 0.0 for one in loaded}}
    for name, path in adapters.items():
        # Two names may mean one file, which is loaded twice then.
        same = [one for one in loaded if one["path"] == str(path)][:1]
        # A server that runs elsewhere has other folders.
        found = same or [one for one in loaded if Path(one["path"]).name == path.name]
        if len(found) != 1:
            raise ConfigurationError(f"the server at {url} has {len(found)} LoRA adapters {path.name}")
        scales[name] = scales[""] | {found[0]["id"]: 1.0}
    # It may run with the cache of earlier prompts, which does not tell adapters apart.
    kept = {} if started else {"cache_prompt": False}
    return {
        name: {"lora": [{"id": id, "scale": scale} for id, scale in given.items()], **kept}
        for name, given in scales.items()
    }
