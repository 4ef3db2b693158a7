"""Train the model of digits.yaml and measure it: writes model.json and MODEL.md beside itself.

    pip install numpy pillow scikit-learn
    cd jobs && python -m digits.train

The pictures come with scikit-learn.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from digits import stages

HELD_OUT = 200  # the last ones, which lie in sample_data/digits
HIDDEN = 32
PICTURES = Path(__file__).parents[2] / "sample_data" / "digits"


def train(pixels: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, object]:
    """Fit the network and return its weights, rounded to 4 digits."""
    fitted = MLPClassifier((HIDDEN,), alpha=0.1, max_iter=2000, random_state=0).fit(pixels, labels)
    (hidden, output), (hidden_bias, output_bias) = fitted.coefs_, fitted.intercepts_
    arrays = {"hidden": hidden, "hidden_bias": hidden_bias, "output": output, "output_bias": output_bias}
    return {name: array.round(4).tolist() for name, array in arrays.items()}


def share_right(answers: list[dict[str, int]], labels: list[int]) -> float:
    """Return how many of the answers name the true digit, between 0 and 1."""
    return sum(answer["digit"] == label for answer, label in zip(answers, labels, strict=True)) / len(labels)


def main() -> None:
    """Train on all pictures but the last 200, then measure on the files of those 200."""
    data = load_digits()
    pixels, labels = data.data[:-HELD_OUT] / 16, data.target[:-HELD_OUT]
    stages.MODEL.write_text(json.dumps(train(pixels, labels)) + "\n", encoding="utf-8")

    classifier = stages.Classifier()
    files = sorted(PICTURES.glob("*.png"))
    page = MODEL_PAGE.format(
        trained=f"{len(pixels):,}",
        trained_right=share_right([classifier.classify(row) for row in pixels], labels.tolist()),
        held_out=len(files),
        right=share_right(classifier([file.read_bytes() for file in files]), [int(file.stem[-1]) for file in files]),
        hidden=HIDDEN,
    )
    stages.MODEL.with_name("MODEL.md").write_text(page, encoding="utf-8")


MODEL_PAGE = """\
# The digit model

Written by `train.py`; do not edit.

**Question.** Which digit, 0 to 9, does an 8 x 8 picture of handwriting show?

**Made from.** scikit-learn's `load_digits`: all but the last {held_out} pictures. Those lie in `sample_data/digits`.

**What it is.** A neural network, 64 pixels, {hidden} hidden units, 10 digits, its weights kept as JSON (`model.json`).

| pictures | count | right |
|---|---|---|
| trained on | {trained} | {trained_right:.1%} |
| held out, the files in sample_data | {held_out} | {right:.1%} |
"""

if __name__ == "__main__":
    main()
