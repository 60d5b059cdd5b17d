"""The `forebay` command: it starts the services as processes and looks at the queue; it imports no service."""
