"""A train step whose encoder is small enough to spell out in a test."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from supcon_jax import parallel
from supcon_jax.losses import momentum_contrast_loss, supcon_loss
from supcon_jax.steps import contrastive

DECAY = 0.9


class Encoder(nn.Module):
    """A convolution, a normalisation, a nonlinearity and the spatial mean."""

    norm: str = "batch"
    axis_name: str | None = None
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv", dtype=self.dtype)(images)
        if self.norm == "batch":
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=DECAY,
                axis_name=self.axis_name,
                dtype=self.dtype,
                name="norm",
            )(x)
        else:
            x = nn.LayerNorm(name="norm")(x)
        return jnp.mean(jnp.tanh(x), (1, 2)).astype(jnp.float32)


class Head(nn.Module):
    """A linear projection."""

    @nn.compact
    def __call__(self, embeddings, *, train):
        return nn.Dense(5, name="dense")(embeddings)


IMAGES = np.random.default_rng(0).normal(size=(16, 2, 6, 6, 3)).astype(np.float32)
LABELS = np.arange(16, dtype=np.int32) % 5
BATCH = {"image": IMAGES, "label": LABELS}


def tiny_step(
    devices=1,
    norm_devices=0,
    *,
    norm="batch",
    dtype=jnp.float32,
    momentum=0.0,
    average=0.0,
    probe=None,
    classifier=None,
    schedule=None,
    **options,
):
    """State and arguments of `train_step` for the small encoder, on some devices."""
    whole = parallel.create_mesh(jax.devices()[:devices])
    mesh, axis = parallel.grouped_mesh(whole, norm_devices)
    modules = contrastive.Modules(Encoder(norm, axis, dtype), Head(), classifier, probe)
    optimizer = optax.sgd(schedule or 1.0)
    state = contrastive.init_state(
        modules,
        optimizer=optimizer,
        image_size=6,
        seed=0,
        momentum_decay=momentum,
        queue_size=40 if momentum else 0,
        average_decay=average,
    )
    axes = mesh.axis_names
    loss = functools.partial(supcon_loss, axis_name=axes, with_diagnostics=True)
    if momentum:
        loss = functools.partial(
            momentum_contrast_loss, axis_name=axes, with_diagnostics=True
        )
    spec = contrastive.StepSpec(
        modules,
        prepare=lambda rows: (rows["image"], rows["label"]),
        loss_function=loss,
        momentum_decay=momentum,
        average_decay=average,
        **options,
    )
    step = functools.partial(
        contrastive.train_step,
        spec=spec,
        mesh=mesh,
        optimizer=optimizer,
        schedule=schedule or optax.constant_schedule(1.0),
    )
    return state, step


def result(state, step, batch=BATCH):
    """Loss, gradients (SGD's update at rate 1) and batch statistics of a step."""
    after, metrics = jax.jit(step)(state, batch)
    gradients = jax.tree.map(jnp.subtract, state.params, after.params)
    return metrics["train/loss"], gradients, after.batch_stats


def assert_close(ours, theirs, tolerance=1e-6):
    ours, theirs = jax.device_get((ours, theirs))
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(theirs))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0)
