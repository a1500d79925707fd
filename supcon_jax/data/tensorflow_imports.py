"""TensorFlow and TensorFlow Datasets, imported quietly and kept off the accelerators."""

from __future__ import annotations

import os
from typing import Any

NO_DATA_NEEDED = "configs/digits.py runs without any data"


def import_tensorflow() -> Any:
    """Imports TensorFlow, quiet and kept off the accelerators.

    Raises:
      ValueError: it is not installed.
    """
    # Both are read when TensorFlow is imported. At its default level it prints a banner
    # about the CPU, and lines of its own for every broken image. JAX sets level 1 when it
    # is imported, so every other level is the user's choice. oneDNN speeds up matrix
    # products, which an input pipeline does not need, and prints a banner too.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise _needs("TensorFlow", error) from None
    # TensorFlow would otherwise take the accelerator's memory from JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def import_tensorflow_datasets() -> Any:
    """Imports TensorFlow Datasets, and TensorFlow as above.

    Raises:
      ValueError: one of them is not installed.
    """
    import_tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _needs("TensorFlow Datasets", error) from None
    return tfds


def _needs(package: str, error: ImportError) -> ValueError:
    return ValueError(
        f"reading image files needs {package} ({error}); pip install -r "
        f"requirements.txt, or use data.name='arrays'; {NO_DATA_NEEDED}"
    )
