"""The kinds of inference servers, by the names of INFERENCE_ENGINE."""

from collections.abc import Callable, Mapping
from typing import Final

from forebay_inference.engine.served.dialect import Dialect
from forebay_inference.engine.served.llamacpp import LlamaCpp

DIALECTS: Final[Mapping[str, Callable[[], Dialect]]] = {"llamacpp": LlamaCpp}
