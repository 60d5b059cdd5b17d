"""The queue and the states of its requests: protocols, their NATS adapters and in-memory twins."""
