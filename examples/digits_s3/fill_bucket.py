"""Fill the bucket: weights.npy, a linear model, and ten images to be recognized."""

from io import BytesIO

import numpy as np
from bucket import NAME, client
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier


def put(key: str, array: np.ndarray) -> None:
    file = BytesIO()
    np.save(file, array)
    client.put_object(Bucket=NAME, Key=key, Body=file.getvalue())


images, digits = load_digits(return_X_y=True)
model = RidgeClassifier().fit(images, digits)

client.create_bucket(Bucket=NAME)
put("weights.npy", np.column_stack([model.coef_, model.intercept_]))
for number, image in enumerate(images[:10]):
    put(f"images/{number}.npy", image)
print(f"The bucket {NAME!r} holds weights.npy and images/0.npy to images/9.npy.")
