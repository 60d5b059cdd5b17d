"""Who asks: keys and their limits."""
