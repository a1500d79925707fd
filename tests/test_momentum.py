"""The momentum encoder and its queue in the train step, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.losses.momentum_contrast import EMPTY
from supcon_jax.steps.momentum import NO_MATCH
from tests.small_step import (
    BATCH,
    IMAGES,
    LABELS,
    Encoder,
    Head,
    assert_close,
    tiny_step,
)


def momentum_by_hand(state, queue, decay):
    """One step in plain NumPy-style code: loss, average, keys with their labels."""
    encoder, head = Encoder(), Head()
    average = jax.tree.map(
        lambda a, p: decay * a + (1 - decay) * p,
        state.momentum["average"],
        state.params,
    )

    def project(params, images):
        embeddings, _ = encoder.apply(
            {
                "params": params["encoder"],
                "batch_stats": state.batch_stats["encoder"],
            },
            images,
            train=True,
            mutable=["batch_stats"],
        )
        x = head.apply({"params": params["head"]}, embeddings, train=True)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    keys = project(average, IMAGES[:, 1])
    everyone = [(k, int(y)) for k, y in zip(keys, LABELS, strict=True)] + queue
    everyone = everyone[:40]

    def loss(params):
        queries, total = project(params, IMAGES[:, 0]), 0.0
        for i, query in enumerate(queries):
            logits = jnp.stack([query @ key for key, _ in everyone]) / 0.1
            own = [j for j, (_, label) in enumerate(everyone) if label == LABELS[i]]
            total += jax.nn.logsumexp(logits) - jnp.mean(logits[jnp.array(own)])
        return total / len(queries)

    value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
    return value, gradients, average, everyone


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_momentum_queue_against_a_loop(devices):
    """Three steps: keys of this step and of earlier ones, oldest out after 40."""
    decay = 0.8
    state, step = tiny_step(devices, momentum=decay)
    step, queue = jax.jit(step), []
    for number in range(1, 4):
        value, gradients, average, everyone = momentum_by_hand(state, queue, decay)
        queue = everyone
        after, metrics = step(state, BATCH)
        assert float(metrics["train/loss"]) == pytest.approx(float(value), rel=1e-5)
        updates = jax.tree.map(jnp.subtract, state.params, after.params)
        assert_close(updates, gradients, tolerance=1e-4)
        assert_close(after.momentum["average"], average)
        stored, filled = after.momentum["queue"], min(40, 16 * number)
        assert stored["groups"][:filled].tolist() == [label for _, label in queue]
        assert np.all(stored["groups"][filled:] == EMPTY)
        assert_close(
            stored["keys"][:filled], jnp.stack([key for key, _ in queue]), 1e-5
        )
        state = after


def test_momentum_unsupervised_keys_match_nobody_later():
    """MoCo: the positive of a query is its own key, and old keys are negatives."""
    state, step = tiny_step(4, momentum=0.5, supervised=False)
    first, metrics = jax.jit(step)(state, BATCH)
    assert float(metrics["train/mean_positives"]) == 1
    assert np.all(first.momentum["queue"]["groups"][:16] == NO_MATCH)
    _, metrics = jax.jit(step)(first, BATCH)
    assert float(metrics["train/mean_positives"]) == 1
    assert float(metrics["train/collapse_loss"]) == pytest.approx(np.log(32), rel=1e-6)
