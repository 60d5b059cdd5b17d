"""How a GGUF file scales the rotary embedding, which the library reads from none but gpt-oss."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forebay_inference.engine.transformers.convert import rope_scaling
from support.architectures import LLAMA_3, THETA, llama3_quotients


def read(tensors: dict[str, Any] | None = None, architecture: str = "llama", **fields: Any) -> dict[str, Any] | None:
    told = {"general.architecture": architecture, f"{architecture}.rope.freq_base": THETA}
    told |= {f"{architecture}.rope.scaling.{name}": value for name, value in fields.items()}
    return rope_scaling(
        SimpleNamespace(
            tensors=[
                SimpleNamespace(name=f"{name}.weight", data=np.array(data)) for name, data in (tensors or {}).items()
            ],
            get_field=lambda name: SimpleNamespace(contents=lambda: told[name]) if name in told else None,
        )
    )


def test_none_is_none() -> None:
    assert read() is None
    assert read(type="none") is None
    assert read({"rope_freqs": [1.0] * 32}) is None


def test_quotients_of_llama_3() -> None:
    assert read({"rope_freqs": llama3_quotients(64)}) == pytest.approx(LLAMA_3)
    with pytest.raises(ValueError, match="none that the library has"):
        read({"rope_freqs": llama3_quotients(64) ** 2})


def test_factors_of_longrope() -> None:
    assert read(
        {"rope_factors_long": [4.0, 5.0], "rope_factors_short": [1.0, 1.5]},
        "phi3",
        original_context_length=4096,
        attn_factor=1.19,
    ) == {
        "rope_type": "longrope",
        "long_factor": [4.0, 5.0],
        "short_factor": [1.0, 1.5],
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.19,
    }


def test_linear_and_yarn() -> None:
    assert read(type="linear", factor=2.0) == {"rope_type": "linear", "factor": 2.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert read(type="yarn", factor=4.0, original_context_length=32_768, architecture="qwen2") == yarn
    with pytest.raises(ValueError, match="scaled by zorp"):
        read(type="zorp")
