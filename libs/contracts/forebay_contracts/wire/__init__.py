"""What two processes must agree on: names on NATS, messages, errors."""
