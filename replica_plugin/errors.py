"""Everything replica_plugin raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class ReplicaError(Exception):
    """The base of all errors of this package."""


class BootError(ReplicaError, RuntimeError):
    """The replica cannot start.

    A RuntimeError too, because gunicorn prints one of those without a traceback.
    """


class OverdueError(BaseException):
    """Raised in the app's code when a request has run for longer than request_timeout.

    Not an Exception, like KeyboardInterrupt, so that code that deals with its own errors lets
    it pass. Whoever catches it to clean up raises it again: the client has been answered.
    """

    def __init__(self) -> None:
        super().__init__("The request has run for longer than request_timeout.")


@dataclass(frozen=True)
class Place:
    """Where a value stands: `replica.yaml:3` or `environment`, and its key path."""

    where: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.key}" if self.key else self.where


@dataclass(frozen=True)
class Problem:
    """One thing to put right: where it stands, the rule, the value seen, the next step."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class ConfigError(ReplicaError):
    """The configuration cannot be used; str() tells its problems, one a line."""

    # A file that is something else altogether has thousands.
    LISTED = 100

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        lines = list(map(str, self.problems[: self.LISTED]))
        if more := len(self.problems) - len(lines):
            lines.append(f"and {more} more problems")
        return "\n".join(lines)
