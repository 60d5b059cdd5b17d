"""The kinds of inference servers, by the names of INFERENCE_ENGINE."""

from collections.abc import Callable, Mapping
from typing import Final

from forebay_inference.engine.served.dialect import Dialect
from forebay_inference.engine.served.llamacpp import LlamaCpp
from forebay_inference.engine.served.sglang import SGLang
from forebay_inference.engine.served.vllm import VLLM

DIALECTS: Final[Mapping[str, Callable[[], Dialect]]] = {"llamacpp": LlamaCpp, "sglang": SGLang, "vllm": VLLM}
