"""From a route into the queue and back."""
