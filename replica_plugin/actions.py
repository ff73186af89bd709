"""What the decisions (decisions.py) can say: the actions, for the dispatcher to perform."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Why(Enum):
    """Why a request is answered without having run."""

    FULL = "full"
    CROWDED = "crowded"
    WAITED = "waited"
    STOPPING = "stopping"


class Send(NamedTuple):
    """Hand this request to the process of this age."""

    request: int
    age: int


class Refuse(NamedTuple):
    """Answer this request without running it."""

    request: int
    why: Why


class Lost(NamedTuple):
    """The process that ran this request died; `overdue` if it was killed, and that is why."""

    request: int
    overdue: bool = False


class Dismiss(NamedTuple):
    """Tell the process of this age to finish what it runs, and leave."""

    age: int


class Inspect(NamedTuple):
    """See what the process of this age is doing, of which we should have heard by now."""

    age: int


class Kill(NamedTuple):
    """Kill the process of this age: it runs nothing but stuck requests, or is silent."""

    age: int


Action = Send | Refuse | Lost | Dismiss | Inspect | Kill
