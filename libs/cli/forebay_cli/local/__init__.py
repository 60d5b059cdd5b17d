"""Processes of this machine that `forebay up` runs."""
