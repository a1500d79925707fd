"""Tiny runs that several test files share."""

import flax.linen as nn
import numpy as np

from configs import digits, linear_digits
from supcon_jax.checkpoint import Checkpointer
from supcon_jax.loop import restore_or_init
from supcon_jax.run import build_train_batches, open_run
from supcon_jax.workdir import leave


def shrink(config):
    """Seconds instead of a minute: 4 channels, 12 steps of 16 images."""
    config.update_from_flattened_dict(
        {
            "batch_size": 16,
            "total_steps": 12,
            "log_every": 5,
            "eval_every": 0,
            "checkpoint_every": 0,
            "encoder.width": 0.25,
            "optimizer.warmup_epochs": 0.02,
            "knn.bank": 200,
        }
    )
    return config


def pretrain_config(**overrides):
    """A tiny pretraining run on the digits."""
    config = shrink(digits.get_config())
    config.update_from_flattened_dict(overrides)
    return config


def linear_config(pretrained, **overrides):
    """A tiny linear evaluation of a tiny run, by steps of SGD."""
    config = shrink(linear_digits.get_config("sgd"))
    config.pretrained = str(pretrained)
    config.update_from_flattened_dict(overrides)
    return config


class OneLayer(nn.Module):
    """An encoder that compiles at once."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(16)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return nn.relu(x)


def build_one_layer(*, axis_name, **options):
    """For `ENCODERS["one_layer"]`, as a test has to enter it."""
    return OneLayer(axis_name)


def probe_config(pretrained, **overrides):
    """A linear evaluation of `untrained_run` by L-BFGS."""
    config = linear_digits.get_config()
    config.encoder.name = "one_layer"
    config.pretrained = str(pretrained)
    config.update_from_flattened_dict(overrides)
    return config


def untrained_run(workdir, **overrides):
    """A pretraining run of `OneLayer` before its first step, which is never compiled."""
    config = pretrain_config(**{"encoder.name": "one_layer", **overrides})
    config.encoder.width = 1.0
    run = open_run(config, workdir)
    checkpointer = Checkpointer(workdir)
    state, _ = restore_or_init(checkpointer, run.plan)
    checkpointer.save(state, 12, {})
    checkpointer.close()
    leave(run.workdir)


def first_batches(run):
    """The host's batches of an opened run, from its first step."""
    return build_train_batches(run.config, run.train_source, run.sampler)


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_trees_equal(ours, theirs):
    """Same structure, bitwise the same arrays."""
    import jax

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
