"""The engines: what turns a request into tokens. `protocol` is the seam, the other modules its adapters."""
