"""Anthropic's Messages API, for its SDKs and Claude Code."""
