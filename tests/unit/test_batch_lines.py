"""The lines of an input file, however it is cut into chunks."""

from collections.abc import AsyncIterator

import pytest

from forebay_api.batches import lines
from forebay_api.batches.lines import Uniqueness, WrongLine
from forebay_api.openai.batches.body import window_s


async def found(data: bytes, piece: int, most: int = 20) -> list[tuple[int, bytes | None]]:
    async def content() -> AsyncIterator[bytes]:
        for start in range(0, len(data), piece):
            yield data[start : start + piece]

    return [one async for one in lines.read(content(), most)]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1_000])
async def test_lines_are_the_same_however_the_file_is_cut(piece: int) -> None:
    data = b"one\n\n two\r\n" + b"x" * 50 + b"\n  \nthree\n" + b"y" * 20 + b"\nlast"
    assert await found(data, piece) == [
        (1, b"one"),
        (2, b" two\r"),
        (3, None),
        (4, b"three"),
        (5, b"y" * 20),
        (6, b"last"),
    ]
    assert await found(b"z" * 50, piece) == [(1, None)]
    assert await found(b"\n\n", piece) == []


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_line() -> None:
    data = b'\xef\xbb\xbf{"custom_id":"a","method":"POST","url":"/u","body":{"n":1}}\r'
    assert lines.parsed(data, "/u") == ("a", b'{"n":1}')


def test_a_custom_id_is_told_from_others_by_all_of_it() -> None:
    unique = Uniqueness()
    for custom_id in ("a", "b", "a ", "ä", "\ud800"):
        unique.check(custom_id)
    with pytest.raises(WrongLine, match="unique"):
        unique.check("a ")


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3_600), ("24h", 86_400), ("7d", 604_800), ("168h", 604_800)])
def test_windows(text: str, seconds: int) -> None:
    assert window_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0h", "169h", "8d", "24", "h", "1.5h", "-1d", "24H", "1w", "30m", "99999h"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match="from `1h` to `7d`"):
        window_s(text)
