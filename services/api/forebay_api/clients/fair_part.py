"""What one key may hold of a store that all keys share."""

from typing import Final

TIMES_FREE: Final = 4
"""A key may hold at most so many times what is free."""


def may_hold(own: float, free: float) -> bool:
    """Whether a key may hold `own` of a store in which `free` is left then.

    A key that is alone gets four fifths, and each of two gets four ninths: another one always finds room. This is the
    dynamic threshold of shared buffers (Choudhury and Hahne, 1998).
    """
    return own <= TIMES_FREE * free
