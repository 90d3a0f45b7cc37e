"""The 8x8 handwritten digits that come with scikit-learn: real data that needs no file."""

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.data.dataset import Dataset

SIZE = 32
TEST_IMAGES = 360


def load() -> Dataset:
    """Returns 1,437 train and 360 test digits as 32x32 grey images.

    The images are upscaled four times (bilinear), so that the usual crop with 4 pixels of padding
    moves a digit by one of its original pixels. The stratified split is always the same.
    """
    digits = load_digits()
    levels = digits.images / digits.images.max()
    upscaled = jax.image.resize(levels, (len(levels), SIZE, SIZE), method="bilinear")
    images = np.round(255 * np.asarray(upscaled)).astype(np.uint8)[..., None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        digits.target.astype(np.int32),
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=0,
    )
    names = tuple(str(name) for name in digits.target_names)
    return Dataset("digits", train_images, train_labels, test_images, test_labels, names)
