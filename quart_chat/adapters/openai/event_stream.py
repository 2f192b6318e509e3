"""Server-sent events as the HTML Standard defines them, from bytes that were cut anywhere."""

from __future__ import annotations

from .failures import bad_response

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Size limit of one event in bytes; a provider that sends more is broken."""


class EventDecoder:
    """Decoder that returns the data of every block, as bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that these bytes complete.

        Raises:
            ProviderError: An event has more than 4 MiB.
        """
        buffer = self._rest + chunk if self._rest else chunk
        if not self._begun and len(buffer) >= 3:
            self._begun = True
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # perhaps the first half of a CRLF
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = buffer.split(b"\n\n")
        self._rest = blocks.pop() + held
        if len(self._rest) > MAX_EVENT_BYTES:
            raise bad_response()
        return [data for block in blocks if (data := _data(block)) is not None]

    def end(self) -> list[bytes]:
        """Return an event that the endpoint did not end with a blank line."""
        data = _data(self._rest.replace(b"\r", b"\n"))
        self._rest = b""
        return [] if data is None else [data]


def _data(block: bytes) -> bytes | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line[:5] == b"data:"]
    return b"\n".join(lines) if lines else None
