"""The embedding engine."""
