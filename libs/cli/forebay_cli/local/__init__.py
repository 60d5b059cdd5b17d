"""The processes of `forebay up` on this machine."""
