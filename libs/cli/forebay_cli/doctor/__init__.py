"""The checks of `forebay doctor`, a module for each kind."""
