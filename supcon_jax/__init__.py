"""Supervised Contrastive Learning in JAX (Khosla et al., arXiv 2004.11362).

    from supcon_jax import supcon_loss  # for a training loop of your own
    from supcon_jax import load_model  # a finished run: .embed(images), .predict(images)

Importing this imports JAX alone: no TensorFlow, no flags, no files. What a finished run
needs is imported when `load_model` is asked for.
"""

import importlib
from collections.abc import Callable
from typing import Any

from supcon_jax.losses import supcon_loss

__version__ = "0.1.0"
__all__ = ["load_model", "supcon_loss"]

load_model: Callable[..., Any]  # of inference.py, which knows configs and checkpoints


def __getattr__(name: str) -> Any:
    if name == "load_model":
        return importlib.import_module("supcon_jax.inference").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
