"""Inference servers beside the worker, such as llama.cpp and vLLM, behind the engine seam. Imports no torch."""
