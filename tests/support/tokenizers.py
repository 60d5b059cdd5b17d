"""A model of any tokenizer of the `tokenizers` library."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from forebay_inference.engine.protocol import LoadedModel
from forebay_inference.engine.tokenizer import LibraryTokenizer


def loaded_with(tokenizer: Tokenizer) -> LoadedModel:
    """What an engine tells of a model that has `tokenizer`."""
    return LoadedModel(LibraryTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer)), 1000, "none", "cpu")
