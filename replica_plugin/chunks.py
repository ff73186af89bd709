"""Where a chunked body ends, as far as it can be seen: what is awaited before a slot is taken.

Only a reason to stop waiting, never framing: where the request ends is for the parser in the
slot to say, which reads the same bytes again. So a body that looks malformed counts as
arrived (the parser answers 400 without waiting), and so does one cut into so many chunks
that following them would take the dispatcher's time from others, or with a chunk whose size has
more digits than any, which would take its memory.
"""

from __future__ import annotations

import re

MANY = 4096  # chunks of one body that are followed
SHORTEST = 5  # bytes of the last chunk, which always comes
LONGEST = 8192  # bytes of a chunk's size line or of a trailer section that are awaited
_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})(?:[ \t]*;[^\r\n]*)?\r\n")


class Chunks:
    """Follows the chunks of one body.

    `at` is where the next size line begins; `needed`, how long the request must at least be
    before there is anything new to see.
    """

    __slots__ = ("_seen", "at", "needed")

    def __init__(self, start: int) -> None:
        self.at = start
        self.needed = start + SHORTEST
        self._seen = 0

    def end_is_seen(self, data: bytes) -> bool:
        """Whether `data`, the request so far, holds the end of the body, or no body at all."""
        self.needed = max(len(data) + 1, self.at + SHORTEST)
        while self.at < len(data):
            line = _SIZE.match(data, self.at)
            if line is None:
                begun = data[self.at : self.at + LONGEST]
                return b"\r\n" in begun or len(begun) == LONGEST
            size = int(line[1], 16)
            if not size:
                return _trailers_end(data, line.end())
            after = line.end() + size
            if data[after : after + 2] != b"\r\n"[: max(0, len(data) - after)]:
                return True
            if after + 2 > len(data):
                self.needed = after + 2 + SHORTEST
                return False
            self.at = after + 2
            self._seen += 1
            if self._seen > MANY:
                return True
        return False


def _trailers_end(data: bytes, start: int) -> bool:
    """Whether the blank line behind the last chunk and its trailers is there, or never comes."""
    rest = data[start : start + LONGEST]
    if rest.startswith(b"\r\n") or b"\r\n\r\n" in rest or len(rest) == LONGEST:
        return True
    return rest.count(b"\n") != rest.count(b"\r\n")
