"""The api: OpenAI requests over HTTP in, JetStream out, frames back."""
