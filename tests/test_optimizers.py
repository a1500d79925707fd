"""Schedules at exact points; optimizers against NumPy, step by step."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from supcon_jax import optimizers
from supcon_jax.models import ProjectionHead, create_encoder
from supcon_jax.optimizers import create_optimizer, create_schedule, path_mask

# --- schedules ---


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_warmup_is_linear_from_zero(name):
    schedule = create_schedule(
        name,
        learning_rate=0.8,
        total_steps=1000,
        steps_per_epoch=10,
        warmup_epochs=5,
        boundaries_epochs=(30,),
    )
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose(schedule(1), 0.8 / 50, rtol=1e-6)
    np.testing.assert_allclose(schedule(25), 0.4, rtol=1e-6)  # half of the warm-up
    np.testing.assert_allclose(schedule(50), 0.8, rtol=1e-6)  # its end: the peak


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    schedule = create_schedule(
        name,
        learning_rate=0.8,
        total_steps=100,
        steps_per_epoch=10,
        boundaries_epochs=(3,),
    )
    np.testing.assert_allclose(schedule(0), 0.8, rtol=1e-6)


def test_cosine_points():
    schedule = create_schedule(
        "cosine",
        learning_rate=2.0,
        total_steps=110,
        steps_per_epoch=10,
        warmup_epochs=1,
    )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        expected = 2.0 * (1 + math.cos(math.pi * share)) / 2
        np.testing.assert_allclose(schedule(10 + 100 * share), expected, atol=1e-6)
    np.testing.assert_allclose(schedule(60), 1.0, rtol=1e-6)
    # Not periodic: a run that is extended does not learn from the end.
    np.testing.assert_allclose(schedule(160), 0.0, atol=1e-6)


def test_ends_of_warmup_and_cosine():
    """Shares of the peak, as in the authors' PyTorch code: 0.01 of 0.5, and 1e-3."""
    schedule = create_schedule(
        "cosine",
        learning_rate=0.5,
        total_steps=110,
        steps_per_epoch=10,
        warmup_epochs=1,
        warmup_start=0.02,
        cosine_end=1e-3,
    )
    points = {0: 0.01, 5: 0.255, 10: 0.5, 60: 0.5 * (1 + 1e-3) / 2, 110: 5e-4}
    for step, rate in points.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)
    np.testing.assert_allclose(schedule(500), 5e-4, rtol=1e-5)


def test_staircase_points():
    schedule = create_schedule(
        "staircase",
        learning_rate=0.5,
        total_steps=1000,
        steps_per_epoch=20,
        warmup_epochs=2,
        decay_rate=0.97,
        decay_epochs=2.5,  # stairs of 50 steps after 40 of warm-up
    )
    for step, stairs in [(40, 0), (89, 0), (90, 1), (139, 1), (140, 2), (540, 10)]:
        np.testing.assert_allclose(schedule(step), 0.5 * 0.97**stairs, rtol=1e-5)


@pytest.mark.parametrize("steps_per_epoch", [122, 82, 94, 194])
@pytest.mark.parametrize("decay_epochs", [0.5, 2.4])
def test_stairs_begin_at_the_same_step_under_jit(steps_per_epoch, decay_epochs):
    """Where a stair is a whole number of steps, and where it is none."""
    schedule = create_schedule(
        "staircase",
        learning_rate=1.0,
        total_steps=10_000,
        steps_per_epoch=steps_per_epoch,
        decay_rate=0.97,
        decay_epochs=decay_epochs,
    )
    steps = np.arange(10_000)
    length = round(10 * decay_epochs) * steps_per_epoch
    expected = 0.97 ** (10 * steps // length).astype(np.float64)
    np.testing.assert_allclose(jax.jit(schedule)(steps), expected, rtol=1e-4)
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-4)


def test_piecewise_boundaries_count_from_the_end_of_the_warmup():
    schedule = create_schedule(
        "piecewise",
        learning_rate=2.5,
        total_steps=1000,
        steps_per_epoch=10,
        warmup_epochs=5,
        decay_rate=0.2,
        boundaries_epochs=(60, 75, 90),
    )
    # In steps: 50 + 600, 50 + 750, 50 + 900.
    for step, passed in [(50, 0), (649, 0), (650, 1), (799, 1), (800, 2), (950, 3)]:
        np.testing.assert_allclose(schedule(step), 2.5 * 0.2**passed, rtol=1e-5)


def test_fractional_steps_per_epoch():
    """1,297 digits in batches of 256: epochs of 5.07 steps are not rounded."""
    spe = 1297 / 256
    schedule = create_schedule(
        "staircase",
        learning_rate=1.0,
        total_steps=500,
        steps_per_epoch=spe,
        warmup_epochs=2,
        decay_rate=0.5,
        decay_epochs=10,
    )
    np.testing.assert_allclose(schedule(5), 5 / (2 * spe), rtol=1e-6)
    # The second stair ends 2 + 20 epochs in, between steps 111 and 112.
    assert 111 < 22 * spe < 112
    np.testing.assert_allclose([schedule(111), schedule(112)], [0.5, 0.25], rtol=1e-6)


def test_a_run_shorter_than_its_warmup():
    schedule = create_schedule(
        "cosine", learning_rate=1.0, total_steps=3, steps_per_epoch=50, warmup_epochs=5
    )
    values = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(values, [0, 0.004, 0.008, 0.012], rtol=1e-6)


def test_constant_and_jit():
    schedule = jax.jit(
        create_schedule(
            "constant",
            learning_rate=0.3,
            total_steps=9,
            steps_per_epoch=3,
            warmup_epochs=1,
        )
    )
    values = [float(schedule(step)) for step in (0, 1, 3, 8)]
    np.testing.assert_allclose(values, [0, 0.1, 0.3, 0.3], rtol=1e-6)


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match="'linear'.*cosine.*--config.optimizer.sch"):
        create_schedule("linear", learning_rate=1, total_steps=1, steps_per_epoch=1)
    with pytest.raises(ValueError, match="'adam'.*lars.*--config.optimizer.name"):
        create_optimizer("adam", 0.1)


# --- optimizers ---

LEARNING_RATES = (0.0, 0.5, 0.3, 0.1, 0.2)
DECAYED = {"conv": {"kernel": True}, "batch_norm": {"scale": False, "bias": False}}


class NumpyOptimizer:
    """What TensorFlow 1 and the official LARS do, one tensor at a time, float64."""

    def __init__(self, name, weight_decay, momentum=0.9, trust=0.001, decay=0.9):
        self.name, self.weight_decay, self.momentum = name, weight_decay, momentum
        self.trust, self.decay = trust, decay
        self.velocity, self.mean_square = 0.0, 1.0  # TF1: the slot starts at one
        self.steps, self.first, self.second = 0, 0.0, 0.0

    def step(self, weight, gradient, learning_rate, decayed):
        if self.name == "adamw":  # algorithm 2 of Loshchilov & Hutter
            self.steps += 1
            self.first = 0.9 * self.first + 0.1 * gradient
            self.second = 0.999 * self.second + 0.001 * gradient**2
            mean = self.first / (1 - 0.9**self.steps)
            square = self.second / (1 - 0.999**self.steps)
            decay = self.weight_decay * weight if decayed else 0
            return weight - learning_rate * (mean / (np.sqrt(square) + 1e-8) + decay)
        g = gradient + (self.weight_decay * weight if decayed else 0)
        m = self.momentum
        if self.name == "lars":
            norms = np.linalg.norm(weight), np.linalg.norm(g)
            ratio = self.trust * norms[0] / norms[1] if decayed and all(norms) else 1.0
            self.velocity = m * self.velocity + learning_rate * ratio * g
            return weight - self.velocity
        if self.name == "rmsprop":
            self.mean_square = self.decay * self.mean_square + (1 - self.decay) * g**2
            scaled = learning_rate * g / np.sqrt(self.mean_square + 1e-3)
            self.velocity = m * self.velocity + scaled
            return weight - self.velocity
        self.velocity = m * self.velocity + g
        ahead = g + m * self.velocity if self.name == "nesterov" else self.velocity
        return weight - learning_rate * ahead


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_equals_numpy_over_several_steps(name, weight_decay):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda _: rng.normal(size=(3, 4)).astype(np.float32), DECAYED)
    rates = jnp.asarray(LEARNING_RATES)
    optimizer = create_optimizer(
        name, lambda step: rates[step], weight_decay=weight_decay
    )
    leaves, treedef = jax.tree.flatten(params)
    expected = [np.asarray(leaf, np.float64) for leaf in leaves]
    witnesses = [NumpyOptimizer(name, weight_decay) for _ in leaves]
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for rate in LEARNING_RATES:
        gradients = [rng.normal(size=(3, 4)).astype(np.float32) for _ in leaves]
        updates, state = update(treedef.unflatten(gradients), state, params)
        params = optax.apply_updates(params, updates)
        expected = [
            witness.step(weight, gradient, rate, decayed)
            for witness, weight, gradient, decayed in zip(
                witnesses, expected, gradients, jax.tree.leaves(DECAYED), strict=True
            )
        ]
        for got, want in zip(jax.tree.leaves(params), expected, strict=True):
            # optax computes 1 - b2^t in float32, where a few digits cancel.
            atol = 5e-5 if name == "adamw" else 1e-6
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=atol)


def test_lars_golden_value():
    """The official unit test: w - 3 * 0.001 * sqrt(5) / sqrt(2) after one step."""
    params, gradients = jnp.array([1.0, 2.0]), jnp.array([0.1, 0.1])
    optimizer = create_optimizer("lars", 3.0, exclude=())
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    expected = np.array([1.0, 2.0]) - 3 * 0.001 * math.sqrt(5) / math.sqrt(2)
    np.testing.assert_allclose(
        optax.apply_updates(params, updates), expected, rtol=1e-6
    )


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 0.1), (0.5, 0.0)])
def test_lars_trust_ratio_is_one_where_a_norm_is_zero(weight, gradient):
    params, gradients = jnp.full(3, weight), jnp.full(3, gradient)
    optimizer = create_optimizer("lars", 2.0, exclude=())
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates, -2.0 * gradients, rtol=1e-6)


def test_keywords_reach_the_optimizer():
    params, gradients = jnp.array([1.0, 2.0]), jnp.array([0.3, -0.1])

    def two_steps(name, **keywords):
        optimizer = create_optimizer(name, 0.1, exclude=(), **keywords)
        state = optimizer.init(params)
        for factor in (1.0, -0.5):  # AdamW does not see a constant gradient's size
            updates, state = optimizer.update(factor * gradients, state, params)
        return np.asarray(updates)

    for name, keyword, value in [
        ("lars", "trust_coefficient", 0.002),
        ("lars", "momentum", 0.5),
        ("momentum", "momentum", 0.5),
        ("nesterov", "momentum", 0.5),
        ("rmsprop", "momentum", 0.5),
        ("rmsprop", "rmsprop_decay", 0.5),
        ("rmsprop", "rmsprop_epsilon", 1.0),
        ("adamw", "adam_b1", 0.5),
        ("adamw", "adam_b2", 0.5),
        ("adamw", "adam_epsilon", 1.0),
    ]:
        changed = two_steps(name, **{keyword: value})
        assert not np.allclose(changed, two_steps(name), rtol=1e-3), (name, keyword)


# --- masks ---


def resnet_paths():
    def init():
        images = jnp.zeros((1, 32, 32, 3))
        encoder = create_encoder("resnet50", stem="cifar")
        embeddings, variables = encoder.init_with_output(
            jax.random.key(0), images, train=True
        )
        head = ProjectionHead(hidden_dims=(16,), batch_norm=False)
        head_variables = head.init(jax.random.key(0), embeddings, train=True)
        return {"encoder": variables["params"], "head": head_variables["params"]}

    return jax.eval_shape(init)


def named_leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


def test_default_mask_spares_batch_norm_alone():
    """Official rule: BatchNorm's scale and bias only; biases of layers are decayed."""
    params = resnet_paths()
    mask = named_leaves(path_mask(params, ("batch_norm",)))
    excluded = {name for name, keep in mask.items() if not keep}
    # ResNet-50: 1 + 16 blocks x 3 + 4 shortcuts = 53 BatchNorms of two tensors each.
    assert len(excluded) == 2 * 53
    assert all(name.split("/")[-1] in ("scale", "bias") for name in excluded)
    kept = {name for name, keep in mask.items() if keep}
    assert {name for name in kept if not name.endswith("/kernel")} == {
        "head/dense1/bias"
    }
    assert len(kept) == 53 + 3
    assert all(type(keep) is bool for keep in mask.values())


def test_mask_patterns_are_searched_in_the_whole_path():
    params = resnet_paths()
    nothing = named_leaves(path_mask(params, ()))
    assert all(nothing.values())
    biases = named_leaves(path_mask(params, ("bias$", "^head/dense_out")))
    assert not biases["head/dense1/bias"] and not biases["head/dense_out/kernel"]
    assert not biases["encoder/batch_norm_stem/bias"]
    assert biases["encoder/batch_norm_stem/scale"] and biases["head/dense1/kernel"]


def test_docstring_examples():
    assert doctest.testmod(optimizers).failed == 0
