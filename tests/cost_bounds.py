"""What a request may cost, apart from time: recorded, and lowered with what makes it cheaper.

Counted for one client that sends one request after the other, to an app that does next to nothing.
"""

from __future__ import annotations

SYSTEM_CALLS = {
    # (mode, threads_per_process, connections): (process, dispatcher)
    ("thread", 1, "kept-alive"): (6, 4),
    ("thread", 1, "new"): (6, 12),
    ("thread", 2, "kept-alive"): (6, 4),
    ("thread", 2, "new"): (6, 12),
    ("gevent", 2, "kept-alive"): (7, 4),
    ("gevent", 2, "new"): (7, 12),
}

INSTRUCTIONS = {
    # thousands, with Python 3.11 and gunicorn 27.0
    "slot": 430,
    "dispatcher, kept-alive": 228,
    "dispatcher, new": 391,
}
