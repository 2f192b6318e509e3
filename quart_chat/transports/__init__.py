"""Transports: the only package that knows requests and sockets."""
