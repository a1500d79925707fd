"""Tiny runs that several test files share."""

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


def probe_config(pretrained, **overrides):
    """A linear evaluation of a tiny run by L-BFGS."""
    config = linear_digits.get_config()
    config.encoder.width = 0.25
    config.pretrained = str(pretrained)
    config.update_from_flattened_dict(overrides)
    return config


def untrained_run(workdir, **overrides):
    """A pretraining run that ended before its first step: no step is compiled for it."""
    run = open_run(pretrain_config(**overrides), workdir)
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
