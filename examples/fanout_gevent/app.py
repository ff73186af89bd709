"""An I/O-bound predictor: what is a flat of AREA square metres worth? GET /price/AREA.

Each model is behind a slow service of its own. A request asks all of them at once, and answers
with the mean of what they say.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import urllib3
from flask import Flask

from replica_plugin import Replica

HERE = "http://127.0.0.1:9001 http://127.0.0.1:9002 http://127.0.0.1:9003"
MODELS = os.environ.get("MODELS", HERE).split()

app = Flask(__name__)
Replica(app)

http = urllib3.PoolManager(
    maxsize=100,  # threads_per_process: a connection for each to each model is kept open
    timeout=urllib3.Timeout(connect=2, read=10),  # a silent model holds a slot no longer than this
    retries=False,
)


@app.get("/price/<int:area>")
def price(area: int) -> dict[str, float]:
    # Written for threads: in gevent mode they are greenlets.
    with ThreadPoolExecutor(len(MODELS)) as pool:
        prices = list(pool.map(lambda model: ask(model, area), MODELS))
    return {"price": sum(prices) / len(prices)}


def ask(model: str, area: int) -> float:
    answer = http.request("GET", f"{model}/price/{area}")
    if answer.status != 200:
        raise urllib3.exceptions.HTTPError(f"{model} says {answer.status}")
    return float(answer.json())


@app.errorhandler(urllib3.exceptions.HTTPError)
def no_answer(error: urllib3.exceptions.HTTPError) -> tuple[dict[str, str], int]:
    app.logger.warning("%s", error)
    return {"error": "A model did not answer."}, 502
