"""Frames on the wire."""

from forebay_contracts.wire.frames import Delta, decode_frame, encode_delta


def test_a_delta_made_without_its_message_reads_as_one() -> None:
    made = decode_frame(encode_delta(2, 1, 7, (8, 9), 'Grüß "dich" 🙂\n'))
    assert made == Delta(attempt=2, index=1, offset=7, tokens=(8, 9), text='Grüß "dich" 🙂\n')
    assert decode_frame(made.encode()) == made
