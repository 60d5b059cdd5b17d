"""Which GPU each worker of `forebay up` uses."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_TIMEOUT_S: Final = 20
_UUID: Final = re.compile(r"\(UUID: ([\w-]+)\)")


def visible_cards(env: Mapping[str, str]) -> list[str]:
    """The GPUs, or their MIG instances, that a process with `env` may use, as CUDA_VISIBLE_DEVICES names them. None
    without NVIDIA's driver."""
    if (named := env.get(_VISIBLE)) is not None:
        return [part.strip() for part in named.split(",") if part.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    uuids = _UUID.findall(listed.stdout)
    return [uuid for uuid in uuids if uuid.startswith("MIG-")] or uuids


def card_of_worker(number: int, cards: Sequence[str]) -> dict[str, str]:
    """The environment that gives worker `number`, from 1, its card, in turn; empty where there is no choice."""
    return {} if len(cards) < 2 else {_VISIBLE: cards[(number - 1) % len(cards)]}
