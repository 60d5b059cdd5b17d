"""Embeddings: the inputs of a request as tokens."""

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import LoadedModel, Tokenizer
from forebay_inference.engine.text.templates import require_known


def encode_inputs(
    request: InferenceRequest, loaded: LoadedModel, added: tuple[list[int], list[int]]
) -> list[list[int]]:
    """The token ids of every input; those in `added` stand before and after each that is given as ids.

    Raises:
        InvalidRequest: an input is too long, or has unknown tokens; or the vectors cannot have so few dimensions.
    """
    if loaded.dimensions is not None and request.dimensions not in (None, loaded.dimensions):
        raise InvalidRequest(
            f"This model's embeddings have {loaded.dimensions} dimensions, which cannot be changed.",
            param="dimensions",
        )
    before, after = added
    inputs: list[list[int]] = []
    for index, given in enumerate(request.prompts):
        if isinstance(given, str):
            tokens = loaded.tokenizer.encode(loaded.prefix + given)
        else:
            require_known(given, loaded.tokenizer.vocabulary_size, f"input[{index}]")
            tokens = [*before, *given, *after]
        if len(tokens) > loaded.context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {loaded.context_length} tokens. However, input {index} "
                f"resulted in {len(tokens)} tokens. Please reduce its length.",
                param="input",
                code="context_length_exceeded",
            )
        inputs.append(tokens)
    return inputs


def added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after an input (`[CLS]` and `[SEP]` for instance)."""
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", special_tokens=False)
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
