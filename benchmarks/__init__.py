"""Measures quart_chat against what people would use instead: ``python -m benchmarks``."""
