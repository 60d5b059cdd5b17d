"""One attempt at one request."""
