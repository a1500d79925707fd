"""Supervised Contrastive Learning in JAX (Khosla et al., arXiv 2004.11362).

    from supcon_jax import supcon_loss  # for a training loop of your own
    from supcon_jax import load_model  # a finished run: .embed(images), .predict(images)

Importing the package imports nothing else; the loss imports JAX alone: no TensorFlow, no
flags, no files.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supcon_jax.losses import supcon_loss

__version__ = "0.1.0"
__all__ = ["load_model", "supcon_loss"]

load_model: Callable[..., Any]  # of inference/, which knows configs and checkpoints
# Loaded when they are first asked for, so that the program can answer a mistake in its
# flags, or a signal, before the second that importing JAX takes.
_HOMES = {
    "load_model": "supcon_jax.inference.model",
    "supcon_loss": "supcon_jax.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
