"""A tokenizer of the Transformers library, as the text layer takes it."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class LibraryTokenizer:
    """See `Tokenizer`. `ids` are as many as model and tokenizer both know. `vocabulary` is llguidance's, which alone
    knows the bytes of a token that is a part of a character."""

    def __init__(self, tokenizer: Any, ids: int | None = None, vocabulary: Any = None) -> None:
        first, template = tokenizer.bos_token_id, tokenizer.chat_template
        self.vocabulary_size: int = len(tokenizer) if ids is None else ids
        self.begin_token: int | None = tokenizer.eos_token_id if first is None else first
        self.chat_template: str | None = (
            template if template is None or isinstance(template, str) else json.dumps(template)
        )
        # The library names only those with a role of their own (`<s>`), and hides these too.
        hidden = {str(added): token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.special_tokens: Mapping[str, int] = hidden | dict(named)
        self._special_ids = frozenset(self.special_tokens.values())
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        options = {"add_special_tokens": special_tokens, "truncation": False, "verbose": False}
        ids: list[int] = self._tokenizer(text, **options).input_ids
        return ids

    def decode(self, tokens: Sequence[int], *, show: Collection[int] = ()) -> str:
        """See `Tokenizer.decode`."""
        if show:
            tokens = [token for token in tokens if token in show or token not in self._special_ids]
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not show, clean_up_tokenization_spaces=False
        )
        return text

    def bytes_of(self, token: int) -> bytes:
        """See `Tokenizer.bytes_of`."""
        if self._vocabulary is None:
            return self.decode([token], show=(token,)).encode()
        return bytes(self._vocabulary.decode_bytes([token]))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """See `Tokenizer.apply_chat_template`."""
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
