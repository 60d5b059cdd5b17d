"""The `forebay` command. It starts the services as processes, reads the queue from NATS and imports no service."""
