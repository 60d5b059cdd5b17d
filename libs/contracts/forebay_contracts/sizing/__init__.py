"""The memory that a model needs."""
