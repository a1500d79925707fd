"""Checkpoints of a run. The only package that knows Orbax.

`manager` saves and resumes, `restore` reads what another run saved, `items` is what both
find in a step.
"""

from supcon_jax.checkpoint.items import checkpoint_dir, digest, saved_steps
from supcon_jax.checkpoint.manager import Checkpointer
from supcon_jax.checkpoint.restore import restore_encoder, restore_state

__all__ = [
    "Checkpointer",
    "checkpoint_dir",
    "digest",
    "restore_encoder",
    "restore_state",
    "saved_steps",
]
