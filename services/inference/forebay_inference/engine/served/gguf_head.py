"""What a GGUF file makes of its last layer: tokens, vectors or scores."""

from pathlib import Path
from typing import NamedTuple

from gguf import GGUFReader, PoolingType


class Head(NamedTuple):
    """The architecture that the file names, empty if none; whether it has a classifier; whether it pools by that."""

    architecture: str
    classifies: bool
    ranks: bool


def head_of(file: Path) -> Head:
    """Read it; blocks for seconds where the vocabulary is large."""
    reader = GGUFReader(file)
    named = reader.get_field("general.architecture")
    architecture = "" if named is None else str(named.contents())
    pooling = reader.get_field(f"{architecture}.pooling_type")
    return Head(
        architecture,
        any(tensor.name.startswith("cls.") for tensor in reader.tensors),
        pooling is not None and pooling.contents() == PoolingType.RANK,
    )
