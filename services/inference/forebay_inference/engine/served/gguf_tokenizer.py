"""The tokenizer in a GGUF file, without torch."""

import json
from pathlib import Path
from typing import Any, Final

from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

_CONTROL: Final = 3
# Names of the library for fields `tokenizer.ggml.*`.
_FIELDS: Final = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_prefix_space": "add_space_prefix",
}
_SPECIAL: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_of(file: Path) -> Any:
    """The tokenizer of the GGUF file, as one of the Transformers library."""
    reader = GGUFReader(file)

    def told(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    if told("tokenizer.ggml.model") == "bert":
        return _word_pieces(told("tokenizer.ggml.tokens"))
    found = {name: value for name, key in _FIELDS.items() if (value := told(f"tokenizer.ggml.{key}")) is not None}
    backend, _ = convert_gguf_tokenizer(told("general.architecture"), dict(found))
    tokens = found["tokens"]
    backend = _without_further_tokens(backend, len(tokens))
    special = {
        name: tokens[place] for name, key in _SPECIAL.items() if (place := told(f"tokenizer.ggml.{key}")) is not None
    }
    begins = told("tokenizer.ggml.add_bos_token")
    options = {
        "add_bos_token": found["tokenizer_type"] == "llama" if begins is None else begins,
        "add_eos_token": bool(told("tokenizer.ggml.add_eos_token")),
        "chat_template": told("tokenizer.chat_template"),
    }
    tokenizer = TokenizersBackend(tokenizer_object=backend, **special, **options)
    known = set(tokenizer.all_special_ids)
    control = [place for place, kind in enumerate(found.get("token_type", ())) if kind == _CONTROL]
    if missing := [tokenizer.convert_ids_to_tokens(place) for place in control if place not in known]:
        tokenizer.add_special_tokens({"extra_special_tokens": missing})
    return tokenizer


def _word_pieces(tokens: list[str]) -> BertTokenizer:
    """BERT's tokenizer, which the library does not read of a GGUF file.

    llama.cpp writes the beginning of a word with U+2581, and a piece that goes on without the ## of BERT. It makes all
    text lower case.
    """
    vocabulary = {_piece(token): place for place, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True)


def _piece(token: str) -> str:
    if token.startswith("\u2581"):
        return token[1:]
    return token if token[:1] == "[" and token[-1:] == "]" else f"##{token}"


def _without_further_tokens(backend: Tokenizer, size: int) -> Tokenizer:
    """`backend` without the tokens that the library adds to a vocabulary that lacks them: the model has `size`."""
    if backend.get_vocab_size() <= size:
        return backend
    described = json.loads(backend.to_str())
    described["added_tokens"] = [added for added in described["added_tokens"] if added["id"] < size]
    model = described["model"]
    model["vocab"] = {token: place for token, place in model["vocab"].items() if place < size}
    if model.get("unk_token") not in model["vocab"]:
        model["unk_token"] = None
    return Tokenizer.from_str(json.dumps(described))
