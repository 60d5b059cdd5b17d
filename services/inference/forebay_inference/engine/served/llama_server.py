"""llama.cpp's server from the wheel `xllamacpp`, as a process: `python -m …llama_server MODEL.gguf --port N`.

An error of the C++ code then ends this process and not the worker.
"""

import argparse
import os
import signal
import sys
from typing import Any

import psutil

from forebay_inference.engine.machine import available_memory, usable_cpus

# llama.cpp's threads (libgomp's) wait for each other hundreds of times in a pass. By default they spin for
# milliseconds. Beside other work on two cores, with the default model, that gave 1 to 2 tokens/s, and this gives 15 to
# 25; alone on the machine 113 and 124. Read once, when the library is loaded.
_SPINS = {"GOMP_SPINCOUNT": "1000"}

_ERRORS = 1
"""The verbosity of llama.cpp that logs errors alone."""

_CHOICES = 128
"""Those of a request are as many connections. A kept connection has a thread of the server to itself, and a new one
without a thread now and then waits for seconds."""

_LEAST_CONTEXT = 512
_LONGEST_INPUT = 8192
"""Tokens of a text that a vector is made of."""
_MEMORY_SHARE = 0.8
"""Of the memory that is free. The context of a slot is made so short that weights and cache fit, as far as they can."""


def main() -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1, help="sequences at once")
    parser.add_argument("--context", type=int, default=0, help="tokens of a slot; 0: the model's, if memory suffices")
    parser.add_argument("--batch", type=int, default=512, help="tokens in one forward pass")
    parser.add_argument("--embedding", action="store_true", help="serve vectors, pooled as the file says")
    parser.add_argument("--reranking", action="store_true", help="serve scores of documents")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="threads of a forward pass")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA adapter; may be repeated")
    parser.add_argument("--lora-init-without-apply", action="store_true", help="apply no adapter by itself")
    parser.add_argument("--cache-ram", type=int, metavar="MIB", help="memory for earlier prompts")
    given = parser.parse_args()
    ends = {signal.SIGTERM, signal.SIGINT}
    # Before the server starts its threads, which inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        server = _server(given)
    except RuntimeError as exc:  # llama.cpp has logged why, and a traceback would push that out of the last lines
        sys.exit(f"{exc}")
    signal.sigwait(ends)
    del server


def _server(given: argparse.Namespace) -> Any:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(_SPINS | os.environ)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.n_parallel = given.slots
    params.n_ctx = given.context * given.slots
    params.n_batch = max(given.batch, given.slots)
    if given.embedding or given.reranking:
        params.embedding = True
        if given.reranking:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        # An input is one piece of a pass, and longer ones are refused. The context bounds it too.
        params.n_batch = params.n_ubatch = max(given.batch, _LONGEST_INPUT)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.n_threads_http = given.slots + _CHOICES
    params.endpoint_metrics = True
    scale = 0.0 if given.lora_init_without_apply else 1.0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, scale) for file in given.lora]
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [key]
    params.verbosity = _ERRORS
    free = int(available_memory() * _MEMORY_SHARE)
    # Beside the cache of the slots, the prompts that were in them before.
    params.cache_ram_mib = min(params.cache_ram_mib, free // 4 >> 20) if given.cache_ram is None else given.cache_ram
    if len(xllamacpp.get_device_info()) == 1:
        # On a CPU, llama.cpp compares with all memory of the machine and leaves so much of it free.
        params.fit_params_target = [psutil.virtual_memory().total - free]
        params.fit_params_min_ctx = _LEAST_CONTEXT
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
