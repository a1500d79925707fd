"""The losses: plain functions of arrays, without configs or files."""

from supcon_jax.losses.supcon import supcon_loss

__all__ = ["supcon_loss"]
