"""The losses: plain functions of arrays, without configs or files."""

from supcon_jax.losses.momentum_contrast import momentum_contrast_loss
from supcon_jax.losses.supcon import supcon_loss

__all__ = ["momentum_contrast_loss", "supcon_loss"]
