"""The same chat, built otherwise."""
