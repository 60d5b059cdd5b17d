"""The worker: requests from JetStream in, tokens out."""
