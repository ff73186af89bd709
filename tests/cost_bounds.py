"""What a request may cost, apart from time: recorded, and lowered with what makes it cheaper.

Counted for one client that sends one request after the other, to an app that does next to nothing.
"""

from __future__ import annotations

SYSTEM_CALLS = {
    # (mode, threads_per_process, connections): (process, dispatcher)
    ("thread", 1, "kept-alive"): (6, 3),
    ("thread", 1, "new"): (6, 10),
    ("thread", 2, "kept-alive"): (6, 3),
    ("thread", 2, "new"): (6, 10),
    ("gevent", 2, "kept-alive"): (7, 3),
    ("gevent", 2, "new"): (7, 10),
}

INSTRUCTIONS = {
    # thousands, with Python 3.11 and gunicorn 27.0; the same code counts 1 % more or less, as it
    # happens to lie in memory
    "slot": 366,
    "dispatcher, kept-alive": 224,
    "dispatcher, new": 351,
}
