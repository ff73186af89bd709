"""An existing app, with a factory, a database, CORS and a proxy in front, that adopts ours."""

from __future__ import annotations

import json
import os
import threading

import served_app
from flask import Flask, request, send_file
from flask_cors import CORS
from flask_sqlalchemy import SQLAlchemy
from werkzeug.middleware.proxy_fix import ProxyFix

from replica_plugin import Replica, ReplicaMiddleware

db = SQLAlchemy()
replica = Replica()


class Visit(db.Model):
    id = db.Column(db.Integer, primary_key=True)


class Crowd:
    """How many requests are in the app, by its own count, and the most there have been."""

    def __init__(self, app):
        self._lock = threading.Lock()
        self._now = self.high = 0
        app.before_request(self._enter)
        app.teardown_request(self._leave)

    def _enter(self):
        with self._lock:
            self._now += 1
            self.high = max(self.high, self._now)

    def _leave(self, error):
        with self._lock:
            self._now -= 1


class Outside:
    """Tells the numbers of the replica without a slot."""

    def __init__(self, app, stats):
        self._app, self._stats = app, stats

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] != "/outside":
            return self._app(environ, start_response)
        now = self._stats()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"running": now.running, "waiting": now.waiting}).encode()]


def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{os.path.abspath('visits.db')}"
    db.init_app(app)
    CORS(app)
    replica.init_app(app)
    app.wsgi_app = Outside(ProxyFix(app.wsgi_app), replica.stats)
    with app.app_context():
        db.create_all()
    add_views(app, Crowd(app))
    return app


def create_plain():
    """No Flask in it."""
    app = ReplicaMiddleware(served_app.application)
    return Outside(app, app.stats)


def add_views(app, crowd):
    @app.get("/")
    def hello():
        return {"client": request.remote_addr, "high": crowd.high, "visits": Visit.query.count()}

    @app.get("/hold/<name>")
    def hold(name):
        served_app.hold(request.environ, lambda *_: None, name)
        return {"waited": replica.waited}

    @app.get("/visit")
    def visit():
        db.session.add(Visit())
        db.session.commit()
        return {"visits": Visit.query.count()}

    @app.get("/fail")
    def fail():
        raise RuntimeError("of the app")

    @app.get("/stream/<int:count>")
    def stream(count):
        return (b"x" * 65536 for _ in range(count))

    @app.get("/file")
    def file():
        return send_file(__file__)

    @app.get("/child")
    def child():
        """What a forked child reads, in numbers of the whole replica."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            now = replica.stats()
            os.write(writer, json.dumps([now.slots, now.running, now.whole]).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader) as pipe:
            return json.load(pipe)
