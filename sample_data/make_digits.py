"""Write the last 200 of scikit-learn's handwritten digits as PNG files, the ones jobs/digits is not trained on.

    pip install scikit-learn pillow
    python sample_data/make_digits.py

The pictures come with scikit-learn.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT = 200
GREY_STEP = 15  # the data has 17 levels of ink, 0 to 16; times 15 they fill a byte and divide back without loss


def make_digits(folder: Path) -> None:
    """Write one 8 x 8 greyscale PNG for each image; its name tells its place in the data and its true label."""
    images, labels = load_digits().images, load_digits().target
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(len(images) - HELD_OUT, len(images)):
        pixels = (images[place] * GREY_STEP).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"image-{place}-is-{labels[place]}.png", optimize=True)


if __name__ == "__main__":
    make_digits(Path(__file__).with_name("digits"))
