#!/usr/bin/env bash
# Make constraints/*.lock anew: every package of an image with its version and hashes. Needs uv (pip install uv).
#
#   TORCH_WHEELS   where the CPU build of PyTorch is: a page or a folder of wheels
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
wheels=${TORCH_WHEELS:-https://download.pytorch.org/whl/cpu/torch/}

lock() {  # lock OUTPUT CONSTRAINT OPTIONS...
    uv --no-config pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command scripts/lock_images.sh \
        --constraint <(echo "$2") "${@:3}" --output-file "constraints/$1"
}

lock build.lock "" - <<< $'setuptools>=80\nsetuptools-scm>=9'  # as in pyproject.toml
lock api.lock "" pyproject.toml --extra api --extra tracing
lock inference-cpu.lock "torch==$torch+cpu" pyproject.toml --extra embeddings --extra tracing --find-links "$wheels"
lock inference-cuda.lock "torch==$torch" pyproject.toml --extra embeddings --extra tracing
lock inference-served.lock "" pyproject.toml --extra served --extra tracing
