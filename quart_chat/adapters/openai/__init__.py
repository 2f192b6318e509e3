"""OpenAI-compatible endpoints: the SDK makes the request, this package reads the stream."""
