"""The app the demo serves: handwritten digits, recognized by a model trained when a process starts.

POST /predict takes JSON: `image`, the index of one of the images that the model has not seen, or
`pixels`, 64 numbers from 0 to 16. The prediction is real but takes a fraction of a millisecond, too
little to see in a picture; so a request may say how long a *simulated* fetch of features shall take
(`fetch_ms`, 0 to 2000), which is a sleep. The answer tells where and when the request ran; begin
and end are time.monotonic(), comparable between the processes of a machine.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from flask import Flask, Response, abort, jsonify, request
from sklearn.datasets import load_digits
from sklearn.svm import SVC

MOST_FETCH_MS = 2000


def create_app() -> Flask:
    """Train on the first half of scikit-learn's digits and serve the second."""
    images, digits = load_digits(return_X_y=True)
    half = len(images) // 2
    # gamma is the one of scikit-learn's own example for this data set.
    model = SVC(gamma=0.001).fit(images[:half], digits[:half])
    unseen, truths = images[half:], digits[half:]
    app = Flask(__name__)

    @app.post("/predict")
    def predict() -> Response:
        begin = time.monotonic()
        wanted = request.get_json()
        pixels, truth = _pick(wanted, unseen, truths)
        time.sleep(_fetch_seconds(wanted))
        prediction = int(model.predict([pixels])[0])
        where = {"pid": os.getpid(), "thread": threading.get_native_id()}
        when = {"begin": begin, "end": time.monotonic()}
        return jsonify(prediction=prediction, truth=truth, **where, **when)

    return app


def _pick(wanted: Any, unseen: Any, truths: Any) -> tuple[Any, int | None]:
    """Pixels and, for an image of the data set, the digit it shows."""
    match wanted:
        case {"pixels": [*pixels]} if len(pixels) == 64 and all(map(_is_number, pixels)):
            return pixels, None
        case {"image": int(index)} if 0 <= index < len(unseen):
            return unseen[index], int(truths[index])
    abort(400, f"image must be 0 to {len(unseen) - 1}, or pixels 64 numbers")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _fetch_seconds(wanted: dict[str, Any]) -> float:
    match wanted.get("fetch_ms", 0):
        case int() | float() as fetch if 0 <= fetch <= MOST_FETCH_MS:
            return fetch / 1000
    abort(400, f"fetch_ms must be 0 to {MOST_FETCH_MS}")


# gunicorn imports this module by name, in each process; nobody else does.
app = create_app()
