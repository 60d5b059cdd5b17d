"""The tokenizer of a model whose weights another process loads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, GenerationConfig

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.matchers import Matchers, lark_of
from forebay_inference.engine.tokenizer import LibraryTokenizer


class ReadTokenizer(NamedTuple):
    """`compile`: see `LoadedModel.compile`; what it makes is a `Grammar`."""

    tokenizer: LibraryTokenizer
    vocabulary_size: int
    end_tokens: frozenset[int]
    compile: Callable[[str], Any]


class Grammar(NamedTuple):
    """A grammar that can be enforced, in llguidance's dialect of Lark; and an LLMatcher at its beginning, to be
    copied."""

    lark: str
    matcher: Any


def read_tokenizer(model: Path) -> ReadTokenizer:
    """The tokenizer of the checkpoint or the GGUF file `model`; blocks.

    Raises:
        ConfigurationError: there is none that can be read.
    """
    with _told(model):
        tokenizer, ends = _of_gguf(model) if model.is_file() else _of_checkpoint(model)
        # A vocabulary may have gaps.
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        matchers = Matchers(tokenizer, size, ends)
    library = LibraryTokenizer(tokenizer, size, matchers.vocabulary)
    return ReadTokenizer(library, size, ends, lambda text: Grammar(lark_of(text), matchers.compile(text)))


def bare_tokenizer(model: Path) -> LibraryTokenizer:
    """The same for a model that generates nothing: without what compiles grammars."""
    with _told(model):
        tokenizer, _ = _of_gguf(model) if model.is_file() else _of_checkpoint(model)
        return LibraryTokenizer(tokenizer)


@contextmanager
def _told(model: Path) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # a file can be broken in any number of ways
        reason = " ".join(str(exc).split())[:300] or type(exc).__name__
        raise ConfigurationError(f"{model} holds no tokenizer that can be read: {reason}") from exc


def _of_checkpoint(folder: Path) -> tuple[Any, frozenset[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids: set[int] = {tokenizer.eos_token_id} - {None}
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        ids.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return tokenizer, frozenset(ids)


def _of_gguf(file: Path) -> tuple[Any, frozenset[int]]:
    from forebay_inference.engine.served.gguf_tokenizer import tokenizer_of

    tokenizer = tokenizer_of(file)
    return tokenizer, frozenset({tokenizer.eos_token_id} - {None})
