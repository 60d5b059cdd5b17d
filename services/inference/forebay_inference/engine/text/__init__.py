"""Text above engines: templates, detokenizer, stop strings, tool calls."""
