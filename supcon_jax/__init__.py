"""Supervised Contrastive Learning in JAX (Khosla et al., arXiv 2004.11362).

    from supcon_jax import supcon_loss

Importing this imports JAX alone: no TensorFlow, no flags, no files.
"""

from supcon_jax.losses import supcon_loss

__version__ = "0.1.0"
__all__ = ["supcon_loss"]
