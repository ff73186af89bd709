"""A hook for gunicorn: a request with X-Stage begins on the test's stage, then in the app."""

from __future__ import annotations

import served_app


def post_worker_init(worker):
    app = worker.wsgi

    def staged(environ, start_response):
        if "HTTP_X_STAGE" in environ:
            served_app.hold(environ, lambda *_: None, environ["PATH_INFO"])
        return app(environ, start_response)

    worker.wsgi = staged
