"""The update of stage 1: devices, microbatches, BatchNorm, probe and momentum encoder."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from supcon_jax import parallel
from supcon_jax.losses import supcon_loss
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.models import Classifier
from supcon_jax.optimizers import create_optimizer
from supcon_jax.run.opening import open_run
from supcon_jax.run.plan import create_plan
from supcon_jax.steps.state import TrainState, keep_finite
from tests.aot import compiled_for_tpu
from tests.runs import RESNET, assert_trees_equal, first_batches, pretrain_config
from tests.small_step import (
    BATCH,
    DECAY,
    IMAGES,
    LABELS,
    Encoder,
    Head,
    assert_close,
    result,
    tiny_step,
)

GRADIENT_SCALE = 2.0**16


def plan_of(devices, config):
    """A plan with plain SGD, whose update is the gradient."""
    mesh = parallel.create_mesh(jax.devices()[:devices])
    plan = create_plan(config, mesh, num_classes=10, num_examples=1297)
    # Small gradients would drown in the rounding of parameters near 1: made large.
    optimizer = optax.sgd(GRADIENT_SCALE)
    return dataclasses.replace(
        plan,
        init=functools.partial(plan.init, optimizer=optimizer),
        seeded_step=functools.partial(plan.seeded_step, optimizer=optimizer),
    )


def start(plan, batch):
    """The state of step 0 and a batch, on the devices of the plan."""
    replicated = parallel.replicated(plan.mesh)
    state = jax.jit(plan.init, out_shardings=replicated)()
    return state, parallel.to_global(batch, plan.mesh)


def one_step(plan, batch):
    """Metrics, gradients, statistics and momentum state of one step."""
    state, batch = start(plan, batch)
    before = jax.device_get(state.params)
    state, metrics = plan.lower().compile()(plan.seed_on_devices(), state, batch)
    gradients = jax.tree.map(
        lambda a, b: (a - np.asarray(b)) / GRADIENT_SCALE, before, state.params
    )
    return jax.device_get((metrics, gradients, state.batch_stats, state.momentum))


MOMENTUM = {
    "loss.contrast_mode": "one",
    "momentum_encoder.decay": 0.9,
    "momentum_encoder.queue_size": 40,
}


@pytest.mark.parametrize(
    "options",
    [
        RESNET | {"loss.name": "supcon", "probe.learning_rate": 0.1},
        {"loss.name": "simclr"},
        {"loss.name": "cross_entropy", "augment.mixup_alpha": 0.5},
        MOMENTUM | {"loss.temperature": 1.0},
    ],
    ids=["supcon+probe", "simclr", "cross_entropy+mixup", "momentum"],
)
def test_eight_devices_equal_one(options, tmp_path):
    config = pretrain_config(**options, **{"projection.batch_norm": True})
    config.projection.hidden_dims = (8,)
    # Views that are almost equal give a gradient of small differences: more rounding.
    config.augment.crop_area = (0.5, 1.0)
    batch = next(first_batches(open_run(config, tmp_path)))
    one, eight = (one_step(plan_of(devices, config), batch) for devices in (1, 8))
    assert jax.tree.structure(one) == jax.tree.structure(eight)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight), strict=True
    ):
        scale = max(float(np.max(np.abs(x))), 1e-3)
        np.testing.assert_allclose(
            y / scale, x / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )
    assert max(float(np.max(np.abs(g))) for g in jax.tree.leaves(one[1])) > 1e-3


def test_state_is_donated(tmp_path):
    config = pretrain_config(**MOMENTUM)
    plan = plan_of(8, config)
    state, batch = start(plan, next(first_batches(open_run(config, tmp_path))))
    plan.lower().compile()(plan.seed_on_devices(), state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.momentum))


def test_step_is_a_function_of_state_and_batch(tmp_path):
    """Twice the same call, twice the same bits; another seed, other views."""
    results = []
    for seed in (0, 0, 1):
        run = open_run(pretrain_config(seed=seed), tmp_path / str(seed))
        batch = next(first_batches(run))
        results.append(
            jax.device_get(jax.jit(run.plan.step)(jax.jit(run.plan.init)(), batch))
        )
    assert_trees_equal(results[0], results[1])
    assert results[0][1]["train/loss"] != results[2][1]["train/loss"]


# --- microbatches and BatchNorm, with an encoder that is small enough to spell out ---


def expected(state, parts, *, norm="batch"):
    """The same by plain differentiation, BatchNorm over each part of the rows in turn."""
    encoder, head = Encoder(norm), Head()

    def loss(params):
        embeddings = [None] * len(IMAGES)
        statistics = []
        for rows in parts:
            outputs, updated = encoder.apply(
                {
                    "params": params["encoder"],
                    "batch_stats": state.batch_stats["encoder"],
                },
                IMAGES[rows].reshape(-1, 6, 6, 3),
                train=True,
                mutable=["batch_stats"],
            )
            statistics.append(updated.get("batch_stats", {}))
            for row, pair in zip(rows, outputs.reshape(-1, 2, 6), strict=True):
                embeddings[row] = pair
        outputs = head.apply(
            {"params": params["head"]}, jnp.stack(embeddings), train=True
        )
        return supcon_loss(outputs, LABELS), statistics

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, statistics), gradients = gradient(state.params)
    return value, gradients, statistics


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_equal_the_whole_batch_without_batch_statistics(devices, count):
    """Gradient caching is exact: the loss and its gradient are those of all pairs."""
    full = result(*tiny_step(1, norm="layer"))
    parts = result(*tiny_step(devices, norm="layer", num_microbatches=count))
    assert_close(parts[:2], full[:2])
    assert_close(
        full[:2], expected(tiny_step(norm="layer")[0], [range(16)], norm="layer")[:2]
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_microbatches_have_batch_statistics_of_their_own(devices):
    """Equal to four parts encoded apart; running statistics move once for each."""
    state, step = tiny_step(devices, num_microbatches=4)
    loss, gradients, stats = result(state, step)
    parts = [range(part, 16, 4) for part in range(4)]
    value, by_hand, statistics = expected(state, parts)
    assert_close((loss, gradients), (value, by_hand), tolerance=2e-6)
    statistics, stats = jax.device_get((statistics, stats))
    running = jax.device_get(state.batch_stats["encoder"])
    for part in statistics:
        # Each part was encoded from the same start: its own share is what it added.
        own = jax.tree.map(
            lambda new, old: new - DECAY * old,
            part,
            jax.device_get(state.batch_stats["encoder"]),
        )
        running = jax.tree.map(lambda old, new: DECAY * old + new, running, own)
    assert_close(stats["encoder"], running)
    whole = result(*tiny_step(1))
    assert abs(float(whole[0]) - float(loss)) > 1e-4  # not the same as all 16 together


@pytest.mark.parametrize(
    ("norm_devices", "groups"), [(0, 1), (8, 1), (4, 2), (2, 4), (1, 8)]
)
def test_batch_norm_over_all_groups_and_single_devices(norm_devices, groups):
    state, step = tiny_step(8, norm_devices)
    loss, gradients, stats = result(state, step)
    size = 16 // groups
    parts = [range(g * size, (g + 1) * size) for g in range(groups)]
    value, by_hand, statistics = expected(state, parts)
    assert_close((loss, gradients), (value, by_hand), tolerance=2e-6)
    # Every device ends with the mean of the groups' statistics.
    mean = jax.tree.map(lambda *x: sum(x) / groups, *statistics)
    assert_close(stats["encoder"], mean)


def test_batch_norm_groups_of_microbatches():
    """Both at once: a part of the batch on the devices of a group."""
    state, step = tiny_step(4, 2, num_microbatches=2)
    loss, gradients, _ = result(state, step)
    parts = [range(g * 8 + m, g * 8 + 8, 2) for m in range(2) for g in range(2)]
    value, by_hand, _ = expected(state, parts)
    assert_close((loss, gradients), (value, by_hand), tolerance=2e-6)


# --- what the compiled step sends between devices ---


def collectives(compiled):
    """The result types of every collective of a compiled program, by kind."""
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    found = {}
    for types, kind in re.findall(
        rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()
    ):
        found.setdefault(kind, []).append(types)
    return found


def lowered_tiny_step(norm_devices=0, **options):
    state, step = tiny_step(8, norm_devices, **options)
    return jax.jit(step).lower(state, BATCH)


def compiled_tiny_step(norm_devices=0, **options):
    return lowered_tiny_step(norm_devices, **options).compile()


def test_batch_norm_alone_costs_collectives():
    """One layer: two when shared (forward and backward), none when each is alone."""
    counts = {
        size: len(collectives(compiled_tiny_step(size))["all-reduce"])
        for size in (0, 2, 1)
    }
    assert counts[1] < counts[0] <= counts[1] + 2
    # In groups, two more: the running statistics' mean, and the loss goes alone.
    assert counts[0] <= counts[2] <= counts[0] + 2


def test_nothing_of_the_encoder_travels():
    """Only projections are gathered; nothing is scattered or sent from one to another."""
    found = collectives(compiled_tiny_step())
    assert set(found) == {"all-reduce", "all-gather"}


def reductions_in_bfloat16(monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(parallel, "varying", lambda tree, axes: tree)
    lowered = lowered_tiny_step(dtype=jnp.bfloat16)
    asked = re.findall(
        r"all_reduce.*?\n(?:.*\n){0,5}?.*-> tensor<([^>]*)>", lowered.as_text()
    )
    done = collectives(lowered.compile())["all-reduce"]
    assert asked and done
    return [t for t in asked if "bf16" in t], [t for t in done if "bf16" in t]


def test_gradients_are_summed_in_float32():
    """Also where convolutions run in bfloat16."""
    asked, done = reductions_in_bfloat16()
    assert not asked and not done


def test_gradients_would_be_summed_in_bfloat16(monkeypatch):
    """Without the cast that the step makes: so the test above can fail."""
    asked, _ = reductions_in_bfloat16(monkeypatch)
    assert asked


@pytest.mark.aot
def test_gradients_are_summed_in_float32_on_a_tpu():
    """The whole step in bfloat16, for eight TPU v5e chips, which need not be there."""
    found = compiled_for_tpu(
        """
from supcon_jax.run.plan import create_plan
from tests.runs import pretrain_config
from tests.test_train_step import collectives

plan = create_plan(pretrain_config(), mesh, num_classes=10, num_examples=1297)
compiled = plan.lower().compile()
sent = collectives(compiled)
low = [types for kind in sent.values() for types in kind if "bf16" in types]
print("found", len(sent["all-reduce"]), low)
"""
    )
    count, _, low = found.partition(" ")
    assert low == "[]" and int(count) > 10


# --- an update that is skipped ---


def test_after_a_skipped_step_the_rate_is_the_one_that_is_logged():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    state, step = tiny_step(schedule=schedule)
    step, before = jax.jit(step), state
    for number in range(8):
        lost = number in (2, 4, 6)
        images = IMAGES * np.float32("nan") if lost else IMAGES
        before = state
        state, metrics = step(state, BATCH | {"image": images})
        assert metrics["optim/skipped"] == lost
    change = optax.global_norm(jax.tree.map(jnp.subtract, before.params, state.params))
    assert metrics["optim/learning_rate"] == pytest.approx(float(schedule(7)))
    assert change / metrics["optim/gradient_norm"] == pytest.approx(
        float(schedule(7)), rel=1e-3
    )


def test_a_skipped_step_is_none_of_the_updates_that_adam_has_made():
    """Of partitioned parameters too: its bias correction belongs to its means."""
    params = {"head": jnp.ones(2), "probe": jnp.ones(2)}
    adam = create_optimizer("adamw", optax.constant_schedule(0.1), exclude=())
    optimizer = optax.partition(
        {"model": adam, "probe": optax.adam(0.1)}, {"head": "model", "probe": "probe"}
    )
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
    for loss in (1.0, jnp.nan):
        after = state.apply_gradients(params, optimizer=optimizer, batch_stats={})
        metrics = {"train/loss": loss, "optim/gradient_norm": 1.0}
        state, _ = keep_finite(state, after, metrics)
    counts = {
        path[-1].tuple_name: int(count)
        for path, count in optax.tree_utils.tree_get_all_with_path(
            state.opt_state, "count"
        )
    }
    assert counts == {"ScaleByAdamState": 1, "ScaleByScheduleState": 2}


# --- probe ---


def test_probe_learns_and_leaves_the_encoder_alone():
    """Its gradient is cross-entropy's on the embeddings; the others' are as without it."""
    probe = Classifier(5)
    state, step = tiny_step(2, probe=probe)
    loss, gradients, _ = result(state, step)
    plain, step_without = tiny_step(2)
    assert_trees_equal(plain.params["encoder"], state.params["encoder"])
    loss_without, gradients_without, _ = result(plain, step_without)
    assert float(loss) == float(loss_without)  # train/loss is the contrastive one
    for name in ("encoder", "head"):
        assert_close(gradients[name], gradients_without[name])

    @jax.jit
    def by_hand(params):
        embeddings, _ = Encoder().apply(
            {
                "params": state.params["encoder"],
                "batch_stats": state.batch_stats["encoder"],
            },
            IMAGES.reshape(-1, 6, 6, 3),
            train=True,
            mutable=["batch_stats"],
        )
        logits = probe.apply({"params": params}, embeddings, train=True)
        return cross_entropy_of_views(logits.reshape(16, 2, 5), LABELS)

    (value, metrics), gradient = jax.value_and_grad(by_hand, has_aux=True)(
        state.params["probe"]
    )
    assert_close(gradients["probe"], gradient)
    _, ours = jax.jit(step)(state, BATCH)
    assert float(ours["train/probe_loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(ours["train/probe_top1"]) == pytest.approx(float(metrics["top1"]))


# --- the classifier beside the contrastive loss ---


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 1), (4, 1), (1, 4), (4, 2)], ids=str
)
def test_joint_loss_is_the_sum_of_its_parts(devices, count):
    """Of encoder, head and classifier the gradient is that of both losses, written out."""
    classifier, weight = Classifier(5), 0.3
    state, step = tiny_step(
        devices,
        norm="layer",
        classifier=classifier,
        cross_entropy_weight=weight,
        num_microbatches=count,
    )
    loss, gradients, _ = result(state, step)

    def by_hand(params):
        encoder = functools.partial(Encoder("layer").apply, train=True)
        embeddings = encoder({"params": params["encoder"]}, IMAGES.reshape(-1, 6, 6, 3))
        outputs = Head().apply({"params": params["head"]}, embeddings, train=True)
        contrastive = supcon_loss(outputs.reshape(16, 2, 5), LABELS)
        logits = classifier.apply(
            {"params": params["classifier"]}, embeddings, train=True
        )
        cross_entropy = cross_entropy_of_views(logits.reshape(16, 2, 5), LABELS)[0]
        return contrastive + weight * cross_entropy, (contrastive, cross_entropy)

    gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    (_, parts), expected_gradients = gradient(state.params)
    assert_close(gradients, expected_gradients, tolerance=2e-6)
    _, metrics = jax.jit(step)(state, BATCH)
    # train/loss stays the contrastive one, to be read against its collapse level.
    assert float(metrics["train/loss"]) == pytest.approx(float(parts[0]), rel=1e-6)
    assert float(loss) == float(metrics["train/loss"])
    assert float(metrics["train/cross_entropy_loss"]) == pytest.approx(
        float(parts[1]), rel=1e-6
    )
    assert 0 <= float(metrics["train/top1"]) <= 1


def test_without_a_weight_nothing_changes():
    plain = tiny_step(2)[0]
    joint = tiny_step(2, classifier=Classifier(5))[0]
    for name in ("encoder", "head"):
        assert_trees_equal(plain.params[name], joint.params[name])


# --- the encoder's average for use ---


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_encoder_average_against_a_loop(decay):
    state, step = tiny_step(2, average=decay)
    assert_trees_equal(state.encoder_average, state.encoder_variables())
    step = jax.jit(step)
    expected = jax.device_get(state.encoder_average)
    for number in range(4):
        state, _ = step(state, BATCH)
        d = min(decay, (1 + number) / (10 + number))
        raw = jax.device_get(state.encoder_variables())
        expected = jax.tree.map(lambda a, x, d=d: d * a + (1 - d) * x, expected, raw)
        assert_close(state.encoder_average, expected)
    assert set(state.encoder_average) == {"params", "batch_stats"}


def test_the_average_takes_no_part_in_the_training():
    ends = []
    for decay in (0.1, 0.999, 0.0):
        state, step = tiny_step(2, average=decay)
        step = jax.jit(step)
        for _ in range(4):
            state, _ = step(state, BATCH)
        ends.append(state)
    followed_closely, followed_slowly, alone = ends
    assert_trees_equal(followed_closely.params, followed_slowly.params)
    assert_trees_equal(followed_closely.batch_stats, followed_slowly.batch_stats)
    # Without an average it is another program, which rounds otherwise.
    assert_close(followed_closely.params, alone.params)
    assert not np.array_equal(
        *(jax.tree.leaves(s.encoder_average["params"])[0] for s in ends[:2])
    )


def test_cross_entropy_over_devices():
    """The mean over the devices' rows is the mean over all rows."""
    mesh = parallel.create_mesh(jax.devices()[:4])
    logits = np.random.default_rng(0).normal(size=(8, 2, 5)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % 5
    split, replicated = jax.P("data"), jax.P()
    sharded = jax.shard_map(
        functools.partial(cross_entropy_of_views, axis_name="data"),
        mesh=mesh,
        in_specs=(split, split),
        out_specs=replicated,
    )
    assert_close(
        jax.jit(sharded)(logits, labels), cross_entropy_of_views(logits, labels)
    )
