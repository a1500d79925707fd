"""Real photos for tests: those that scikit-learn brings along."""

import functools

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


@functools.cache
def photo(name="china", side=64):
    """The middle of a real photo, `[side, side, 3]` float32."""
    image = Image.fromarray(load_sample_image(f"{name}.jpg"))
    left, top = (image.width - image.height) // 2, 0
    image = image.crop((left, top, left + image.height, image.height))
    image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255
