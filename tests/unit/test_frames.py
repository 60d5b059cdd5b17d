"""Frames on the wire."""

import json

import pytest

from forebay_contracts.wire.frames import Delta, decode_frame, encode_delta


@pytest.mark.parametrize(
    "delta",
    [
        Delta(attempt=2, index=1, offset=7, tokens=(8, 9), text='Grüß "dich" 🙂\n'),
        Delta(attempt=1, tokens=(0,), text="t0"),
        Delta(attempt=1, offset=1, tokens=(5,)),
        Delta(attempt=1, tokens=(5,), text="Yes", reasoning="Hm"),
    ],
)
def test_a_delta_is_encoded_the_same_without_its_message(delta: Delta) -> None:
    encoded = encode_delta(delta.attempt, delta.index, delta.offset, delta.tokens, delta.text, delta.reasoning)
    assert json.loads(encoded) == json.loads(delta.encode())
    assert decode_frame(encoded) == delta
