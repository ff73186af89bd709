"""Libraries that were imported before gevent's patch, and hold what it was to replace.

`from ssl import SSLContext` binds what is there at that moment; a patch changes the module
ssl, and not what others have taken from it. That matters with preload_app, where the app is
loaded in the master and the patch comes in its children, as with gunicorn's gevent worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

REPLACED = {
    "select": ("poll", "select"),
    "socket": ("create_connection", "getaddrinfo", "socket"),
    "ssl": ("SSLContext", "SSLSocket"),
    "subprocess": ("Popen",),
}
"""What waits for somebody else, and so blocks all of a process when it is not replaced.

Others are left out, of which every framework has some, and which do little harm: a lock holds
nobody up unless its holder waits.
"""

EXEMPT = {*sys.stdlib_module_names, "gevent", "greenlet", "gunicorn", "replica_plugin", "zope"}
"""What gevent patches or knows, and what is meant to hold them."""

GRPC = "grpc (which also needs `grpc.experimental.gevent.init_gevent()`)"


def warning(original: Callable[[str, str], Any]) -> str | None:
    """What to tell the operator, if there is anything. `original` is of a module and a name."""
    held = _held({name: original(module, name) for module, name in _replaced()})
    found = [f"{module} ({', '.join(names)})" for module, names in held.items()]
    if "grpc" in sys.modules:
        found.append(GRPC)
    if not found:
        return None
    return (
        f"Imported before gevent's patch, which does not reach them: {'; '.join(found)}. They can "
        "block all requests of a process, or fail. Load the app without preload_app, or begin "
        "gunicorn's configuration with `from gevent import monkey; monkey.patch_all()`."
    )


def _replaced() -> list[tuple[str, str]]:
    return [(module, name) for module, names in REPLACED.items() for name in names]


def _held(originals: dict[str, Any]) -> dict[str, list[str]]:
    """Modules to the names of what they hold."""
    known = {id(value): name for name, value in originals.items()}
    held = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in EXEMPT or name == "__main__":
            continue
        ids = {id(value) for value in list(getattr(module, "__dict__", {}).values())}
        if ids & known.keys():
            held[name] = sorted(known[each] for each in ids & known.keys())
    return held
