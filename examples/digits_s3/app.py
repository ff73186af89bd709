"""An I/O-bound predictor: which digit is on an image in the bucket? GET /predict/NAME.

The prediction itself, with a linear model, takes microseconds: a request waits for the bucket
nearly all its time.
"""

from io import BytesIO

import numpy as np
from botocore.exceptions import ClientError
from bucket import NAME, client
from flask import Flask

from replica_plugin import Replica

app = Flask(__name__)
Replica(app)


def fetch(key: str) -> np.ndarray:
    answer = client.get_object(Bucket=NAME, Key=key)
    return np.load(BytesIO(answer["Body"].read()))


weights = fetch("weights.npy")


@app.get("/predict/<name>")
def predict(name: str) -> dict[str, int]:
    image = fetch(f"images/{name}.npy")
    return {"digit": int((weights @ np.append(image, 1)).argmax())}


@app.errorhandler(client.exceptions.NoSuchKey)
def no_such_image(error: ClientError) -> tuple[dict[str, str], int]:
    return {"error": "There is no such image in the bucket."}, 404
