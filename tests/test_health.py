"""A run that is not well: no update that is not a number, no save of a state that is lost."""

import dataclasses
import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import linear_eval, pretrain
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.run import health, loop
from supcon_jax.run.health import Health, judge
from supcon_jax.run.opening import open_run
from supcon_jax.writers import read_metrics
from tests.runs import assert_trees_equal, linear_config, pretrain_config
from tests.small_step import BATCH, tiny_step

RULE = {"loss_rise": 3.0, "norm_growth": 10.0}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (Health(5.0, 20.0), None),
        (Health(19.9, 20.0), None),
        (Health(20.1, 20.0), "the loss is"),
        (Health(float("nan"), 20.0), "the loss is nan"),
        (Health(5.0, 199.0), None),
        (Health(5.0, 201.0), "norm is 201"),
        (Health(5.0, float("inf")), "norm is inf"),
        (Health(5.0, 20.0, finite=False), "not finite"),
    ],
)
def test_rule(now, says):
    found = judge(now, Health(5.0, 20.0), **RULE)
    assert found is None if says is None else says in found


def test_small_and_negative_losses_have_room():
    """A loss near 0 may rise by 3; it is relative only above 1."""
    assert judge(Health(0.5, 1.0), Health(0.01, 1.0), **RULE) is None
    assert judge(Health(3.5, 1.0), Health(0.01, 1.0), **RULE) is not None
    assert judge(Health(-1.0, 1.0), Health(-3.0, 1.0), **RULE) is None
    off = {"loss_rise": 0.0, "norm_growth": 0.0}
    assert judge(Health(1e9, 1e9), Health(0.0, 1.0), **off) is None


def test_measure_and_docstring():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    assert health.measure(params, {}, 1.5) == Health(1.5, 5.0, True, pytest.approx(0.2))
    stats = {"mean": jnp.array([jnp.nan])}
    assert not health.measure(params, stats, 1.5).finite
    assert doctest.testmod(health).failed == 0


def test_a_classifier_that_begins_with_zeros_is_saved(tmp_path):
    """Its norm grows from 0, which is no explosion; one from 3 to 31 is."""
    assert judge(Health(1.0, 0.9, small=0.1), Health(1.0, 0.0), **RULE) is None
    assert judge(Health(1.0, 1.1, small=0.1), Health(1.0, 0.0), **RULE) is not None
    assert judge(Health(1.0, 31.0, small=0.1), Health(1.0, 3.0), **RULE) is not None
    config = linear_config("random", **{"classifier.init": "zeros"}, checkpoint_every=4)
    linear_eval.linear_eval(config, tmp_path)
    assert saved_steps(tmp_path)[-1] == config.total_steps


def test_an_update_that_is_no_number_is_not_kept():
    """On the device: everything is as before, but for the number of the step."""
    state, step = tiny_step(4, average=0.9)
    step = jax.jit(step)
    state, _ = step(state, BATCH)
    images = BATCH["image"].copy()
    images[3, 0, 2, 2, 1] = np.nan
    after, metrics = step(state, BATCH | {"image": images})
    assert float(metrics["optim/skipped"]) == 1 and np.isnan(metrics["train/loss"])
    assert int(after.step) == int(state.step) + 1
    assert_trees_equal(after.replace(step=state.step), state)
    # And the next good one is kept.
    again, metrics = step(after, BATCH)
    assert float(metrics["optim/skipped"]) == 0
    assert not np.array_equal(
        *(s.params["head"]["dense"]["bias"] for s in (again, after))
    )


def with_bad_steps(run, bad):
    """The run, whose loss is not a number at some steps."""
    step = run.plan.seeded_step

    def broken(seed, state, batch):
        is_bad = jnp.isin(state.step + 1, jnp.asarray(bad))
        after, metrics = step(seed, state, batch)
        nan = jnp.where(is_bad, jnp.nan, 1.0)
        metrics |= {"train/loss": metrics["train/loss"] * nan}
        kept = jax.tree.map(lambda o, n: jnp.where(is_bad, o, n), state, after)
        metrics["optim/skipped"] = jnp.where(is_bad, 1.0, metrics["optim/skipped"])
        return kept.replace(step=after.step), metrics

    plan = dataclasses.replace(run.plan, seeded_step=broken)
    return dataclasses.replace(run, plan=plan)


def test_stop_at_the_first_bad_step(tmp_path):
    """Also between two progress lines; what was saved before stays."""
    run = open_run(pretrain_config(log_every=100, checkpoint_every=4), tmp_path)
    with pytest.raises(FloatingPointError) as stopped:
        loop.train(with_bad_steps(run, [7]), evaluate=lambda state: {})
    message = str(stopped.value)
    assert (
        "the loss is nan and the gradient's norm" in message and "at step 7" in message
    )
    assert "step 4 is saved, and well" in message
    assert "--config.optimizer.learning_rate" in message
    assert saved_steps(tmp_path) == [4]


def test_skipping_is_bounded(tmp_path, messages):
    changes = {"health.on_nonfinite": "skip", "health.max_skipped": 2}
    run = open_run(pretrain_config(**changes), tmp_path / "few")
    final = loop.train(with_bad_steps(run, [5, 6, 9]), evaluate=lambda state: {})
    assert np.isfinite(final["train/loss"])
    told = [m for m in messages if "its update is left out" in m]
    assert [m.split(" at step ")[1].split(";")[0] for m in told] == ["5", "6", "9"]
    run = open_run(pretrain_config(**changes), tmp_path / "many")
    with pytest.raises(FloatingPointError, match="at step 7"):
        loop.train(with_bad_steps(run, [5, 6, 7]), evaluate=lambda state: {})


@pytest.mark.parametrize("bad", [4, 12])
def test_a_skipped_step_that_saves_counts_once_and_is_saved(tmp_path, bad, messages):
    """The last step too: what is judged is the state, which has no part of its batch."""
    changes = {"health.on_nonfinite": "skip", "health.max_skipped": 1}
    run = open_run(
        pretrain_config(**changes, checkpoint_every=4, log_every=1), tmp_path
    )
    loop.train(with_bad_steps(run, [bad]), evaluate=lambda state: {})
    assert len([m for m in messages if "its update is left out" in m]) == 1
    assert saved_steps(tmp_path)[-1] == 12
    # A bare NaN is no JSON.
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    steps = [r["step"] for r in read_metrics(tmp_path) if "train/loss" not in r]
    assert steps == [bad]


def test_divergence_is_not_saved_as_health(tmp_path):
    """A rate of a million: no checkpoint holds what it made of the parameters."""
    config = pretrain_config(checkpoint_every=1, total_steps=40, keep_checkpoints=3)
    config.optimizer.learning_rate = 1e6
    config.optimizer.warmup_epochs = 0.1
    with pytest.raises(FloatingPointError) as stopped:
        pretrain.pretrain(config, tmp_path)
    assert "not saved" in str(stopped.value) or "the loss is" in str(stopped.value)
    steps = saved_steps(tmp_path)
    assert steps  # the first ones were well, and stay
    for step in steps:
        leaves = jax.tree.leaves(restore_encoder(tmp_path, step=step)["params"])
        assert max(float(np.max(np.abs(leaf))) for leaf in leaves) < 100
    # Before any checkpoint the folder is free; after one, the config is bound to it.
    assert f"step {steps[-1]} is saved, and well" in str(stopped.value)


def test_the_thresholds_decide(tmp_path):
    """With both parts of the rule off, the same run saves what it has."""
    config = pretrain_config(
        checkpoint_every=1,
        total_steps=6,
        **{"health.loss_rise": 0.0, "health.norm_growth": 0.0},
    )
    config.optimizer.learning_rate = 1e4
    config.optimizer.warmup_epochs = 0.0
    try:
        pretrain.pretrain(config, tmp_path)
    except FloatingPointError:
        pass
    largest = max(
        float(np.max(np.abs(leaf)))
        for leaf in jax.tree.leaves(restore_encoder(tmp_path)["params"])
    )
    assert largest > 100


# --- metrics.jsonl ---


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff\xfe", b"null", b"[1]", b'{"step": "x"}', b'{"step": 3', b"{}", b"7"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_costs_no_other(garbage, place, tmp_path):
    lines = [json.dumps({"step": n, "wall_s": 1.0 * n}).encode() for n in (1, 2)]
    lines.insert(place, garbage)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
