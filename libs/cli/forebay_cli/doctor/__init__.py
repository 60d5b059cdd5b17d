"""The checks of `forebay doctor`."""
