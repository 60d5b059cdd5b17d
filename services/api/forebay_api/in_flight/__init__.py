"""The way of a request from its route into the queue and back."""
