"""A plan: what a run computes, without data, folder or the devices it is for."""

import re

import jax
import numpy as np
import pytest

from configs import linear_digits, supcon_cifar10
from supcon_jax import parallel
from supcon_jax.run.opening import open_run
from supcon_jax.run.plan import create_plan, init_encoder
from tests.aot import compiled_for_tpu
from tests.runs import first_batches, linear_config, pretrain_config

IMAGES = {"num_classes": 10, "num_examples": 1297}


def cifar_like(**changes):
    """More views than four tiles of an accelerator; nothing of it is run."""
    config = supcon_cifar10.get_config()
    config.encoder.name = "resnet8"
    config.update_from_flattened_dict(
        {"batch_size": 4096, "encoder.dtype": "auto"} | changes
    )
    return config


def lowered_for(platform, config, monkeypatch):
    """The text of the step of a config, lowered here for another platform."""
    mesh = parallel.create_mesh(jax.devices()[:1])
    monkeypatch.setattr(parallel, "platform", lambda mesh: platform)
    plan = create_plan(config, mesh, **IMAGES)
    traced = plan.jit_step().trace(*plan.abstract_arguments())
    name = "cuda" if platform == "gpu" else platform
    return traced.lower(lowering_platforms=(name,)).as_text()


def convolutions(text):
    """Element types of the convolutions' results."""
    found = re.findall(r"stablehlo\.convolution.*?-> tensor<(?:\d+x)+(\w+)>", text)
    assert found
    return set(found)


def tiles(text):
    """Sides of the square similarity tiles of the loss."""
    return {int(a) for a, b in re.findall(r"tensor<(\d+)x(\d+)xf32>", text) if a == b}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_step_is_that_of_the_hardware_it_is_for(platform, monkeypatch):
    text = lowered_for(platform, cifar_like(), monkeypatch)
    here = platform == "cpu"
    assert convolutions(text) == {"f32" if here else "bf16"}
    assert ({512, 2048} & tiles(text)) == {512 if here else 2048}
    # On a CPU the images are augmented 64 at a time, elsewhere all at once.
    assert ("tensor<64x2x32x32x3xf32>" in text) == here
    # A CPU's gradients of convolutions keep its one fast layout.
    layouts = set(re.findall(r"convolution.* dim_numbers = (.*?), window", text))
    assert (layouts == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}) == here


def test_linear_step_is_that_of_the_hardware_it_is_for(monkeypatch):
    config = linear_digits.get_config("sgd")
    config.encoder.dtype = "auto"
    assert convolutions(lowered_for("cpu", config, monkeypatch)) == {"f32"}
    assert convolutions(lowered_for("tpu", config, monkeypatch)) == {"bf16"}


def test_seeds_share_one_program_and_have_views_of_their_own(tmp_path):
    """So that the second seed of a config is not compiled; its views are the same bits."""
    plans, first = [], None
    for seed in (3, 2**31 - 1):
        config = pretrain_config(seed=seed, **{"encoder.width": 0.125})
        run = open_run(config, tmp_path / str(seed))
        plans.append(run.plan)
        first = first or next(first_batches(run))
    one, other = plans
    assert one.lower().as_text() == other.lower().as_text()
    compiled = one.lower().compile()
    state = jax.jit(one.init, out_shardings=parallel.replicated(one.mesh))()
    kept = jax.device_get(state)
    batch = parallel.to_global(first, one.mesh)
    losses = []
    for plan in plans:
        start = jax.device_put(kept, parallel.replicated(one.mesh))
        _, metrics = compiled(plan.seed_on_devices(), start, batch)
        losses.append(float(metrics["train/loss"]))
    # As a constant of the program it gives the same.
    _, alone = jax.jit(other.step)(kept, batch)
    assert losses[1] == pytest.approx(float(alone["train/loss"]), rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.aot
def test_a_step_for_tpu_chips_that_are_not_here():
    found = compiled_for_tpu(
        """
from supcon_jax.run.plan import create_plan
from tests.test_plan import IMAGES, cifar_like, convolutions, tiles

plan = create_plan(cifar_like(batch_size=16384), mesh, **IMAGES)
lowered = plan.lower()
text = lowered.as_text()
lowered.compile()
print("found", plan.platform, convolutions(text), 2048 in tiles(text))
"""
    )
    assert found == "tpu {'bf16'} True"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.views": 3},
        {"augment.policy": "auto_augment"},
        {"data.classes_per_batch": 4},
    ],
    ids=str,
)
def test_shapes_are_those_of_the_run(changes, tmp_path):
    """What is planned without data is what the data are."""
    run = open_run(pretrain_config(**changes), tmp_path)
    batch = next(first_batches(run))
    planned = run.plan.abstract_batch()
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in planned.items()
    }
    alone = create_plan(run.config, run.mesh, **IMAGES)
    assert alone.abstract_batch() == planned
    assert alone.total_steps == run.plan.total_steps
    state = jax.eval_shape(alone.step, alone.abstract_state(), planned)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), run.plan.abstract_state()
    )


def test_a_plan_touches_no_data_and_no_folder(tmp_path, monkeypatch):
    """Neither exists, and nothing is made in the current folder."""
    monkeypatch.chdir(tmp_path)
    mesh = parallel.create_mesh(jax.devices()[:1])
    config = cifar_like(**{"data.dir": "/nowhere", "data.name": "no_such_dataset"})
    assert create_plan(config, mesh, **IMAGES).total_steps > 0
    config = linear_config("nowhere")
    plan = create_plan(config, mesh, **IMAGES)
    assert set(plan.abstract_state().params) == {"head"}
    assert set(plan.abstract_frozen()[0]) == {"params", "batch_stats"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 12}, "batch size 12"),
        ({"encoder.nam": "resnet8"}, "--config.encoder"),
        ({"encoder.batch_norm_devices": 3}, "--config.encoder.batch_norm_devices"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(changes, message):
    config = pretrain_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        create_plan(config, parallel.create_mesh(), **IMAGES)


@pytest.mark.parametrize(
    "config, metric",
    [
        (pretrain_config(**{"loss.name": "cross_entropy"}), "loss"),
        (pretrain_config(**{"loss.cross_entropy_weight": 0.5}), "cross_entropy_loss"),
        (linear_config("random"), "loss"),
    ],
    ids=["baseline", "joint", "linear_eval"],
)
def test_logit_adjustment_is_in_every_cross_entropy(config, metric, monkeypatch):
    """A classifier of zeros has logits of zero: what is left is tau log pi."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "classifier.init": "zeros",
            "classifier.logit_adjustment": 1.5,
            "compilation_cache": False,
        }
    )
    counts = np.arange(10) * 20 + 1
    mesh = parallel.create_mesh(jax.devices()[:1])
    plan = create_plan(config, mesh, class_counts=counts, **IMAGES)
    labels = np.arange(16, dtype=np.int32) % 10
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 1, 8, 8, 3), np.uint8),
        "label": labels,
        "id": np.stack([np.zeros(16), np.arange(16)], 1).astype(np.int32),
    }
    frozen = (init_encoder(plan),) if config.mode == "linear_eval" else ()
    _, metrics = jax.jit(plan.step)(plan.init(), batch, *frozen)
    adjusted = 1.5 * np.log(counts / counts.sum())
    losses = np.log(np.exp(adjusted).sum()) - adjusted[labels]
    np.testing.assert_allclose(metrics[f"train/{metric}"], losses.mean(), rtol=1e-5)
