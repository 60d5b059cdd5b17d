"""An answer goes on from its prompt: together they are what the tokenizer makes of the tokens of both."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from forebay_contracts.wire.frames import TokenLogprob as Shown
from forebay_inference.engine.protocol import Capabilities, Step, TokenLogprob
from forebay_inference.engine.text.choice import Choice
from forebay_inference.engine.text.detokenizer import REPLACEMENT, Context, Decoder, Detokenizer
from forebay_inference.engine.text.prepare import prepare
from forebay_inference.engine.text.templates import Chat
from forebay_inference.engine.text.tool_formats import HERMES
from support.engine import completion
from support.tokenizers import loaded_with

SPECIAL = "<s>"
WORDS = ["▁", "a", "b", "n", "▁a", "▁Paris", "is", "é", "日", "'", "▁."]


def _bytes_vocabulary() -> dict[str, int]:
    pieces = ["<unk>", SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return {piece: place for place, piece in enumerate(pieces)}


def _sentencepiece(prepends: bool, strips: bool) -> Tokenizer:
    """As Llama 2 has it; Gemma neither prepends nor strips."""
    tokenizer = Tokenizer(models.BPE(_bytes_vocabulary(), [], byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), (SPECIAL, 0.0), *((word, -1.0) for word in WORDS)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    tokenizer.decoder = decoders.Metaspace("▁", scheme)
    return tokenizer


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<unk>", SPECIAL, *alphabet, "Ġa", "ĠParis", "Ã©", "æĹ", "Ġð"]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_piece() -> Tokenizer:
    pieces = ["<unk>", SPECIAL, "a", "b", "paris", "##is", "##n", ".", "'", "n't", "é"]
    tokenizer = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


MADE: dict[str, Callable[[], Tokenizer]] = {
    "llama": lambda: _sentencepiece(prepends=True, strips=True),
    "gemma": lambda: _sentencepiece(prepends=False, strips=False),
    "metaspace-first": lambda: _metaspace("first"),
    "metaspace-always": lambda: _metaspace("always"),
    "metaspace-never": lambda: _metaspace("never"),
    "byte-level": _byte_level,
    "word-piece": _word_piece,
}
REAL = [name for name in MADE if name != "word-piece"]


@cache
def tokenizer(name: str) -> Tokenizer:
    made = MADE[name]()
    made.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return made


@cache
def decoder(name: str) -> Decoder:
    made = tokenizer(name)
    return Decoder(lambda ids: made.decode(list(ids)), made.encode("a", add_special_tokens=False).ids)


def ids(name: str, *pieces: str) -> list[int]:
    return [tokenizer(name).token_to_id(piece) for piece in pieces]


def utf8(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def pushed(name: str, tokens: Sequence[int], context: Context | None = None) -> list[str]:
    detokenizer = Detokenizer(decoder(name), context)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@st.composite
def sequences(draw: st.DrawFn, name: str) -> tuple[list[int], list[int]]:
    """A prompt and an answer, of any tokens but `<unk>`; characters of several tokens are often whole."""
    made = tokenizer(name)
    one = st.integers(1, made.get_vocab_size() - 1).map(lambda token: [token])
    text = st.sampled_from(["日", "é", "🙂", "\n", "\n日", "a"]).map(lambda text: made.encode(text).ids)
    word = st.sampled_from(["▁", "▁Paris", "a", SPECIAL, "ĠParis", "##is", "."])
    known = word.map(lambda piece: made.token_to_id(piece) or 1).map(lambda token: [token])
    parts = st.lists(one | text | known | known, min_size=1, max_size=12)
    return list(chain(*draw(parts))), list(chain(*draw(parts)))


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60)
@given(data=st.data())
def test_prompt_and_answer_concatenate(name: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(sequences(name))
    one = decoder(name)
    together = one.decode([*prompt, *answer])
    context = one.context(prompt, whole=False)
    before = one.decode(prompt[: len(prompt) - len(context.pending)])
    pieces = pushed(name, answer, context)
    if REPLACEMENT not in together:
        assert before + "".join(pieces) == together
    assert "".join(pushed(name, answer)) == one.decode(answer) or REPLACEMENT in one.decode(answer)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=40)
@given(data=st.data())
def test_an_answer_that_is_taken_over_has_no_seam(name: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(sequences(name))
    made = choice(name, prompt, len(answer))
    pieces = ["" if (event := made.advance(Step((token,)))) is None else event.text for token in answer]
    for cut in range(1, len(answer)):
        again = choice(name, prompt, len(answer))
        again.replay(answer[:cut])
        event = again.advance(Step(tuple(answer[cut:])))
        assert "".join(pieces[:cut]) + (event.text if event is not None else "") == "".join(pieces)


def choice(name: str, prompt: Sequence[int], limit: int) -> Choice:
    return Choice(
        0, decoder(name), bytes_of(name), frozenset(), limit, context=decoder(name).context(prompt, whole=True)
    )


def bytes_of(name: str) -> Callable[[int], bytes]:
    def found(token: int) -> bytes:
        piece = tokenizer(name).id_to_token(token)
        return bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.encode()

    return found


@pytest.mark.parametrize("name", REAL)
def test_the_first_word_of_an_answer_keeps_its_space(name: str) -> None:
    space = "Ġ" if name == "byte-level" else "▁"
    (paris,) = ids(name, f"{space}Paris")
    for prompt in (ids(name, "a"), ids(name, "a", SPECIAL), ids(name, f"{space}a")):
        assert "".join(pushed(name, [paris], decoder(name).context(prompt, whole=True))) == " Paris"
    # A chat's answer is a text of its own, decoded as Transformers does.
    assert "".join(pushed(name, [paris])) == tokenizer(name).decode([paris])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_characters_of_bytes_come_whole_one_after_the_other(name: str) -> None:
    word = "日本語"
    tokens = ids(name, "▁a", *(byte for character in word[1:] for byte in utf8(character)), "▁Paris")
    assert [piece for piece in pushed(name, tokens) if piece][1:] == ["本", "語", " Paris"]
    lines = ids(name, *utf8("\n"), *utf8("本"), *utf8("\n"), "▁Paris")
    assert "".join(pushed(name, lines)) == "\n本\n Paris"


def test_bytes_that_are_no_text_are_held_for_a_while_only() -> None:
    garbage = ids("llama", *["<0xA5>"] * 40)
    pieces = pushed("llama", garbage)
    assert "".join(pieces) == REPLACEMENT * 40
    assert len(pieces[-1]) < 20


@pytest.mark.parametrize("name", REAL)
def test_a_logprob_has_the_space_of_its_token(name: str) -> None:
    (paris,) = ids(name, ("Ġ" if name == "byte-level" else "▁") + "Paris")
    step = Step((paris,), (TokenLogprob(paris, -1.0, ((paris, -1.0), (1, -2.0))),))

    def shown(made: Choice) -> Shown:
        event = made.advance(step)
        assert event is not None
        return event.logprobs[0]

    within = shown(choice(name, ids(name, "a"), 9))
    assert (within.text, within.utf8, [other.text for other in within.top]) == (" Paris", b" Paris", [" Paris", "<s>"])
    first = shown(Choice(0, decoder(name), bytes_of(name), frozenset(), 9))
    assert first.text == tokenizer(name).decode([paris])


@pytest.mark.parametrize(
    ("prompt", "limit", "echo"),
    [
        ("a Paris", 4, "a Paris"),
        (("▁a", "▁Paris"), 4, "a Paris"),
        (("▁a", *utf8("日")[:2]), 4, "a"),
        (("▁a", *utf8("日")[:2]), 0, "a\ufffd\ufffd"),
    ],
)
def test_what_is_echoed_ends_where_the_answer_begins(prompt: Any, limit: int, echo: str) -> None:
    given = prompt if isinstance(prompt, str) else tuple(ids("llama", *prompt))
    request = completion(given, echo=True, max_tokens=limit)
    can = Capabilities("exact", grammars="no", logprobs=True)
    loaded = loaded_with(tokenizer("llama"))
    chat = Chat(loaded.tokenizer, HERMES, {})
    (found,) = prepare(request, loaded, can, HERMES, chat, None, decoder("llama")).prompts
    assert found.echo == echo
