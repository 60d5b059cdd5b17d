"""NATS itself: connection, topology, permissions, presence."""
