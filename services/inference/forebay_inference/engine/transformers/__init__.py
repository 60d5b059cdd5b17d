"""The real engine, and the only place where torch, transformers, bitsandbytes and gguf are imported."""

from forebay_inference.engine.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
