"""Weights of other programs: files of arrays, and the names that arrays have in them."""

from supcon_jax.weights.files import WeightsFile, read_weights, write_safetensors
from supcon_jax.weights.layouts import from_state_dict, to_state_dict

__all__ = [
    "WeightsFile",
    "from_state_dict",
    "read_weights",
    "to_state_dict",
    "write_safetensors",
]
