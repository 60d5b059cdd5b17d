"""Python starts with the kernels of a processor without AVX-512 and AMX when this folder is on PYTHONPATH.

Four libraries choose their kernels by processor, each by a switch of its own: ATen (softmax in attention), MKL (the
bf16 products in attention), oneDNN (the output layer), bitsandbytes (4-bit products). The last has no switch.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"


class _WithoutAvx512(importlib.abc.MetaPathFinder):
    """Has the native library of bitsandbytes say that the processor has no AVX-512 BF16."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "bitsandbytes.cextension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def without(module: ModuleType) -> None:
            execute(module)
            module.lib.has_avx512bf16_cpu = lambda: 0

        spec.loader.exec_module = without  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WithoutAvx512())
