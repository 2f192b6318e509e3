"""Any OpenAI-compatible endpoint: the SDK asks, the stream is read here."""
