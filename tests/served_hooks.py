"""A gunicorn configuration with hooks, and a logger, that tell what they see and can raise."""

from __future__ import annotations

from gunicorn.glogging import Logger


def pre_request(worker, req):
    worker.log.info("hook: pre %s %s", req.method, req.uri)
    if ("X-A", "pre") in req.headers:
        raise RuntimeError("in pre_request")


def post_request(worker, req, environ, resp):
    status = resp.status if resp is not None else None
    worker.log.info("hook: post %s %s %s %s", req.method, req.uri, status, bool(environ))
    if ("X-A", "post") in req.headers:
        raise RuntimeError("in post_request")


class RaisingLogger(Logger):
    def access(self, resp, req, environ, request_time):
        if "raise-in-log" in environ.get("RAW_URI", ""):
            raise RuntimeError("in the access log")
        super().access(resp, req, environ, request_time)
