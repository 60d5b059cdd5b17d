"""llama.cpp's server from the wheel `xllamacpp`: `python -m … MODEL.gguf PORT SLOTS BATCH`, until SIGTERM."""

import signal
import sys

import xllamacpp


def main() -> None:
    """Load and serve on 127.0.0.1."""
    model, port, slots, batch = sys.argv[1], *map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_batch = max(batch, slots)
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    main()
