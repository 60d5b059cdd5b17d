from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from forebay_inference.engine.protocol import Step
from forebay_inference.engine.text.choice import Choice
from forebay_inference.engine.text.detokenizer import Decoder, Detokenizer, StopStrings

# One to five pieces of this alphabet make overlaps of stop strings likely, and most characters several bytes long.
texts = st.text(alphabet="ab\n é€𝄞\ufffd", max_size=40)


@st.composite
def byte_tokens(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A text's bytes, cut into tokens anywhere, inside of characters too."""
    data = draw(texts).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=20)))
    bounds = [0, *[cut for cut in cuts if cut < len(data)], len(data)]
    return data, [data[a:b] for a, b in pairwise(bounds)]


def decoder(vocabulary: Sequence[bytes]) -> Decoder:
    return Decoder(lambda ids: b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace"))


@given(byte_tokens())
def test_any_split_of_a_text_over_tokens_gives_the_text(case: tuple[bytes, list[bytes]]) -> None:
    data, tokens = case
    detokenizer = Detokenizer(decoder(tokens))
    pieces = [detokenizer.push(index) for index in range(len(tokens))]
    assert "".join(pieces) + detokenizer.flush() == data.decode()


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=20))
def test_bytes_that_are_no_text_come_out_as_a_decoder_would_have_them(tokens: list[bytes]) -> None:
    detokenizer = Detokenizer(decoder(tokens))
    pieces = [detokenizer.push(index) for index in range(len(tokens))]
    assert "".join(pieces) + detokenizer.flush() == b"".join(tokens).decode("utf-8", "replace")


def test_half_a_character_waits_for_its_other_half() -> None:
    tokens = [b"caf", b"\xc3", b"\xa9", b"!"]
    detokenizer = Detokenizer(decoder(tokens))
    assert [detokenizer.push(index) for index in range(4)] == ["caf", "", "é", "!"]


stop_lists = st.lists(st.text(alphabet="ab\n é", min_size=1, max_size=4), min_size=1, max_size=4)


def cut_by_character(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What a reader who looks after every character would show."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(byte_tokens(), stop_lists)
def test_a_stop_string_never_leaks(case: tuple[bytes, list[bytes]], stops: list[str]) -> None:
    data, tokens = case
    expected, matched = cut_by_character(data.decode(), stops)
    choice = Choice(0, decoder(tokens), bytes, frozenset(), len(tokens) + 1, stops=stops)
    shown = ""
    for step in [*(Step((index,)) for index in range(len(tokens))), Step((), finish="length")]:
        event = choice.advance(step)
        shown += event.text if event is not None else ""
        assert expected.startswith(shown)
        if choice.finish_reason is not None:
            break
    assert shown == expected
    assert (choice.finish_reason == "stop") == (matched is not None)


@given(texts, stop_lists, st.integers(0, 40))
def test_the_grouping_of_text_does_not_matter(text: str, stops: list[str], cut: int) -> None:
    whole, halves = StopStrings(stops), StopStrings(stops)
    once = whole.push(text) + whole.flush()
    twice = halves.push(text[:cut]) + halves.push(text[cut:]) + halves.flush()
    assert (once, whole.matched) == (twice, halves.matched)


def test_text_that_only_looked_like_a_stop_string_is_shown() -> None:
    stops = StopStrings(["</end>"])
    assert stops.push("a</en") == "a"
    assert stops.push("tity>") == "</entity>"
    assert stops.matched is None
