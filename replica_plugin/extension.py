"""The Flask extension.

Under our workers the dispatcher keeps the cap, and there is nothing to do for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


class Replica:
    """Declares that a Flask app is served by a replica: `Replica(app)`, or later `init_app`."""

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Register with an app, once. No state of the app is kept here."""
        app.extensions["replica"] = self
