"""Models of the Transformers library in one continuous batch. Its modules import torch and more; this one does not."""

import os
from typing import Final

# torch's threads wait for each other hundreds of times in a pass. libgomp reads this once, when torch is loaded: they
# spin some 0.2 ms, and not at all while `waiting` makes them yield. Its default spins 6 ms and more.
_WAITS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
if not _WAITS.keys() & os.environ.keys():
    os.environ.update(_WAITS)

SPINS_BY_DEMAND: Final = _WAITS.items() <= os.environ.items()
"""False where the user has set how threads wait."""
