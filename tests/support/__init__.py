"""Helpers that tests share: real servers, nothing of ours replaced."""
