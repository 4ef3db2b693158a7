"""Pictures in, digits out: Classifier, the one stage of digits.yaml."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODEL = Path(__file__).with_name("model.json")
SIZE = (8, 8)
WHITE = 240.0  # the brightest grey in the pictures, see sample_data/make_digits.py


class Classifier:
    """A neural network with one hidden layer, its weights kept as JSON."""

    def __init__(self) -> None:
        """Load the weights."""
        model = json.loads(MODEL.read_text(encoding="utf-8"))
        self.hidden = np.array(model["hidden"]), np.array(model["hidden_bias"])
        self.output = np.array(model["output"]), np.array(model["output_bias"])

    def __call__(self, pictures: list[bytes]) -> list[dict[str, Any]]:
        """Return for each picture file the digit it shows and how sure the network is, between 0 and 1."""
        return [self.classify(read_pixels(picture)) for picture in pictures]

    def classify(self, pixels: NDArray[np.float64]) -> dict[str, Any]:
        """Classify one picture by itself: a matrix product of many may round differently with their number."""
        active = np.maximum(pixels @ self.hidden[0] + self.hidden[1], 0)
        scores = active @ self.output[0] + self.output[1]
        weights = np.exp(scores - scores.max())
        digit = int(weights.argmax())
        return {"digit": digit, "probability": round(float(weights[digit] / weights.sum()), 6)}


def read_pixels(picture: bytes) -> NDArray[np.float64]:
    """Return the picture's 64 pixels between 0 and 1; raise ValueError for another size, OSError for no picture."""
    with Image.open(io.BytesIO(picture)) as image:
        if image.size != SIZE:
            raise ValueError(f"picture is {image.width} x {image.height} pixels, expected {SIZE[0]} x {SIZE[1]}")
        return np.asarray(image.convert("L"), dtype=np.float64).reshape(-1) / WHITE
