"""An HTTP server on the engine: OpenAI's protocol, streams, metrics, and a chat page."""
