"""A CPU-bound predictor: which digit is this? POST /predict with 64 pixels, GET / for help.

The model is trained when the process starts. A prediction is the average of 300 trees over 25
noisy copies of the image (test-time augmentation): some 15 ms of CPU.
"""

import os

# One native thread per process: the replica already has a process per core, and thread pools of
# BLAS and OpenMP beside each other only take turns on the same cores. Set before numpy is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
from flask import Flask, Response, abort, jsonify, request
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

from replica_plugin import Replica

HELP = """POST /predict with {"pixels": [64 numbers from 0 to 16]}, an 8 x 8 image row by row.
The answer: {"digit": 0 to 9, "probability": 0 to 1}.
"""
NOISE = np.random.default_rng(0).normal(size=(25, 64))

app = Flask(__name__)
Replica(app)
model = RandomForestClassifier(300, n_jobs=1, random_state=0).fit(*load_digits(return_X_y=True))


@app.get("/")
def index() -> Response:
    return Response(HELP, mimetype="text/plain")


@app.post("/predict")
def predict() -> Response:
    probabilities = model.predict_proba(read_pixels() + NOISE).mean(axis=0)
    digit = int(probabilities.argmax())
    return jsonify(digit=digit, probability=round(float(probabilities[digit]), 3))


def read_pixels() -> np.ndarray:
    try:
        return np.array(request.get_json()["pixels"], dtype=float).reshape(64)
    except (KeyError, TypeError, ValueError):
        abort(400, HELP)
