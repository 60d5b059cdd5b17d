"""The commands of `forebay`: a module declares the options of one command, or of a few that belong together."""
