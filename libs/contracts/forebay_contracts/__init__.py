"""What the api, the workers and the command line agree on: names, messages, errors, settings, topology."""
