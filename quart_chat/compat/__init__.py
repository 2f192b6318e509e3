"""Hooks into other libraries' internals, one file a library, each with its version window."""
