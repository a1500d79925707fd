"""Supervised Contrastive Learning in JAX (Khosla et al., arXiv 2004.11362).

    from supcon_jax import supcon_loss

Importing the package imports nothing else; the loss imports JAX alone: no TensorFlow, no
flags, no files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supcon_jax.losses import supcon_loss

__version__ = "0.1.0"
__all__ = ["supcon_loss"]

# Loaded when they are first asked for, so that the program can answer a mistake in its
# flags, or a signal, before the second that importing JAX takes.
_HOMES = {"supcon_loss": "supcon_jax.losses"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
