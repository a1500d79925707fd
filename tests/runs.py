"""Tiny runs that several test files share."""

import flax.linen as nn
import jax
import numpy as np

from configs import digits, linear_digits
from supcon_jax.checkpoint import Checkpointer
from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES
from supcon_jax.models import ENCODERS
from supcon_jax.run.batches import build_train_batches
from supcon_jax.run.loop import restore_or_init
from supcon_jax.run.opening import open_run
from supcon_jax.run.workdir import leave
from supcon_jax.writers import MetricWriter

# What a test names that is about convolutions.
RESNET = {"encoder.name": "resnet8", "encoder.width": 0.25}


def shrink(config):
    """Seconds instead of a minute: one layer, 12 steps of 16 images."""
    config.update_from_flattened_dict(
        {
            "batch_size": 16,
            "total_steps": 12,
            "log_every": 5,
            "eval_every": 0,
            "checkpoint_every": 0,
            "encoder.name": "one_layer",
            "encoder.width": 1.0,
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
        x = nn.Dense(16, use_bias=False)(images.reshape(len(images), -1))
        x = nn.BatchNorm(
            use_running_average=not train, axis_name=self.axis_name, name="batch_norm"
        )(x)
        return nn.relu(x)


def build_one_layer(*, axis_name, **options):
    """What `encoder.name="one_layer"` names, here and in processes that import this."""
    return OneLayer(axis_name)


ENCODERS["one_layer"] = build_one_layer


def probe_config(pretrained, **overrides):
    """A linear evaluation of `untrained_run` by L-BFGS."""
    config = linear_digits.get_config()
    config.encoder.name = "one_layer"
    config.pretrained = str(pretrained)
    config.update_from_flattened_dict(overrides)
    return config


def save_made_up(config, workdir, *, step=12):
    """A finished workdir with random weights and made-up metrics: nothing is compiled.

    Its loss falls, and its kNN rises.
    """
    run = open_run(config, workdir)
    rng = np.random.default_rng(0)

    def random(leaf):
        return (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    state = jax.tree.map(random, run.plan.abstract_state())
    state = state.replace(
        step=np.asarray(step, np.int32), batch_stats=_positive(state.batch_stats)
    )
    if average := state.encoder_average:
        variances = _positive(average["batch_stats"])
        state = state.replace(encoder_average={**average, "batch_stats": variances})
    checkpointer = Checkpointer(run.workdir)
    checkpointer.save(jax.device_put(state), step, {})
    checkpointer.close()
    writer = MetricWriter(
        run.folder,
        total_steps=step,
        steps_per_epoch=run.plan.steps_per_epoch,
        writers=(),
    )
    for number in range(1, step + 1):
        metrics = {
            "train/loss": 5.0 / number,
            "train/collapse_loss": 3.4,
            "knn/top1": 1 - 0.5 / number,
            "optim/learning_rate": 0.1,
            "train/images_per_sec": 1000.0 + number,
            "goodput/share": 0.5,
        }
        writer.write(number, metrics, **({"final": True} if number == step else {}))
    writer.close()


def _positive(tree):
    """What may be variances."""
    return jax.tree.map(lambda leaf: 1 + leaf**2, tree)


def untrained_run(workdir, **overrides):
    """A pretraining run of `OneLayer` before its first step, which is never compiled."""
    config = pretrain_config(**overrides)
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
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def write_corrupted(folder, images, labels, change=lambda image, severity: image):
    """A corrupted dataset as CIFAR-10-C is released; `change(images, severity)` makes it."""
    folder.mkdir()
    severities = [change(images, severity) for severity in SEVERITIES]
    for corruption in CORRUPTIONS:
        np.save(folder / f"{corruption}.npy", np.concatenate(severities))
    np.save(folder / "labels.npy", np.tile(labels, len(SEVERITIES)))
    return folder
