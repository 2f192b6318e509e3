"""``python -m quart_chat``."""

from .cli import main

main(prog_name="quart_chat")
