"""The app that every peer serves: `app` in Flask, and `bare` without it.

An answer says which process gave it and when it began, on the clock that all processes share; and
how much longer it slept than it was asked to, in seconds.
"""

from __future__ import annotations

import os
import time

from flask import Flask

app = Flask(__name__)


@app.get("/")
def nothing() -> str:
    return "ok"


@app.get("/sleep/<float:seconds>")
def sleep(seconds: float) -> str:
    began = time.monotonic()
    time.sleep(seconds)
    return f"{os.getpid()} {began} {time.monotonic() - began - seconds}"


@app.get("/burn/<float:seconds>")
def burn(seconds: float) -> str:
    """Use so much CPU, however long that takes."""
    began = time.monotonic()
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return f"{os.getpid()} {began}"


time.sleep(float(os.environ.get("BENCHMARK_BOOT", "0")))
