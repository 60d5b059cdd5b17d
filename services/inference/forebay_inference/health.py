"""The health of a worker: for probes, and for the worker itself, which ends when its engine is broken or stuck."""

from dataclasses import dataclass
from typing import Final

from forebay_inference.engine.model import Model

CHECK_INTERVAL_S: Final = 1.0
"""Time between two checks of the engine."""


@dataclass(frozen=True, slots=True)
class Health:
    """`status` is that of the heartbeat; `fault` says why the worker must be replaced, None while it is healthy."""

    status: str
    nats_connected: bool
    fault: str | None

    @property
    def live(self) -> bool:
        """Whether it may go on, while it loads, serves or drains."""
        return self.fault is None

    @property
    def ready(self) -> bool:
        """Whether it takes requests now."""
        return self.live and self.status == "ready" and self.nats_connected


class EngineWatch:
    """Finds an engine that is broken or stuck, if `look` is called every CHECK_INTERVAL_S.

    It counts calls and not seconds: while the whole process is stopped, the engine cannot make a step.
    """

    def __init__(self, engine: Model, stall_timeout_s: float) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._steps = -1
        self._looks_without_a_step = 0

    def look(self) -> None:
        """Check whether the engine has made a step since the last call, or has nothing to do."""
        now = self._engine.status()
        moved = now.steps != self._steps or now.sequences == 0
        self._looks_without_a_step = 0 if moved else self._looks_without_a_step + 1
        self._steps = now.steps

    def fault(self) -> str | None:
        """Why the engine serves no more requests, None while it does."""
        if (fault := self._engine.status().fault) is not None:
            return fault
        if self._looks_without_a_step * CHECK_INTERVAL_S >= self._stall_timeout_s:
            return f"no step in {self._stall_timeout_s:g} s with requests in the batch"
        return None
