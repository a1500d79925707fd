"""The Vision Transformer: sizes, what skipping does, and a step with it on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import pretrain
from supcon_jax.builders import OWN_OPTIONS, build_encoder
from supcon_jax.config.keys import KEYS
from supcon_jax.models import ENCODERS, VisionTransformer, create_encoder, part_of
from supcon_jax.models.vit import TransformerBlock, resize_positions
from supcon_jax.parallel import create_mesh
from supcon_jax.run.plan import create_plan
from tests.runs import RESNET, pretrain_config
from tests.test_resnet import abstract_init, count

# As timm counts them for 224 pixels, without the classifier.
KNOWN = {
    "vit_tiny_patch16": 5_717_416 - 193 * 1000,
    "vit_small_patch16": 22_050_664 - 385 * 1000,
    "vit_base_patch32": 88_224_232 - 769 * 1000,
}
VIT = {"encoder.name": "vit_two", "encoder.stem": "imagenet"}


@pytest.fixture
def two_blocks(monkeypatch):
    """A Vision Transformer that compiles at once, under the name "vit_two"."""

    def build(*, dtype, remat, **_):
        return VisionTransformer(4, 8, heads=2, depth=2, dtype=dtype, remat=remat)

    monkeypatch.setitem(ENCODERS, "vit_two", build)


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts_and_parts(name):
    encoder = create_encoder(name, image_size=224)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    init = functools.partial(encoder.init_with_output, train=True)
    output, variables = jax.eval_shape(init, jax.random.key(0), images)
    assert output.shape == (2, encoder.channels) and output.dtype == jnp.float32
    assert count(variables["params"]) == KNOWN[name]
    parts = {part: part_of(part, encoder.num_stages) for part in variables["params"]}
    assert parts.pop("norm_out") == 12
    assert parts == {
        "conv_stem": 0,
        "token_stem": 0,
        "positions_stem": 0,
        **{f"stage{number}_block": number for number in range(1, 13)},
    }


def test_sizes_that_it_cannot_have_are_refused():
    with pytest.raises(ValueError, match="no whole number of patches.*encoder.name"):
        create_encoder("vit_tiny_patch16", image_size=40)
    with pytest.raises(ValueError, match="'imagenet'.*--config.encoder.stem"):
        create_encoder("vit_tiny_patch4", stem="cifar")
    output, _ = abstract_init(create_encoder("vit_tiny_patch4", width=0.25))
    assert output.shape == (2, 48)


def test_its_keys_are_those_of_the_config(two_blocks):
    """And an encoder that has no use for one says so."""
    assert {
        name: KEYS[f"encoder.{name}"].default for name in OWN_OPTIONS
    } == OWN_OPTIONS
    changed = {"class_token": False, "stochastic_depth": 0.2}
    flags = {f"encoder.{name}": value for name, value in changed.items()}
    encoder = build_encoder(pretrain_config(**VIT, **flags), "cpu")
    assert {name: getattr(encoder, name) for name in changed} == changed
    images = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(
        functools.partial(encoder.init, train=False), jax.random.key(0), images
    )
    assert shapes["params"]["positions_stem"].shape == (1, 4, 8)
    assert "token_stem" not in shapes["params"]
    for name, value in changed.items():
        config = pretrain_config(**RESNET, **{f"encoder.{name}": value})
        with pytest.raises(
            ValueError, match=f"resnet8 has none .*--config.encoder.{name}"
        ):
            build_encoder(config, "cpu")
    config = pretrain_config(**VIT, **{"encoder.convention": "torchvision"})
    with pytest.raises(ValueError, match="allowed: official, because vit_two has none"):
        build_encoder(config, "cpu")


def test_skipped_branches_add_nothing_and_the_others_more():
    """Each of the four outcomes is the input with its branches, twice as large or not."""
    images = 64
    plain = TransformerBlock(heads=2, drop=0.0, number=1, dtype=jnp.float32)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (3, 8)), (images, 3, 8))
    variables = jax.eval_shape(plain.init, jax.random.key(1), x, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape) / 2, variables)["params"]
    keys = jax.random.split(jax.random.key(2), images)
    block = jax.jit(plain.clone(drop=0.5).apply)
    y = block({"params": params}, x, keys)

    @jax.jit
    def outcome(first, second):
        factors = {"proj": first, "fc2": second}
        scaled = {
            name: jax.tree.map(
                functools.partial(jnp.multiply, factors.get(name, 1)), layer
            )
            for name, layer in params.items()
        }
        return plain.apply({"params": scaled}, x[:1], None)[0]

    # A branch is left out, or divided by the half of the images that have it.
    outcomes = [outcome(a, b) for a in (0.0, 2.0) for b in (0.0, 2.0)]
    nearest = np.abs(np.asarray(y)[:, None] - np.stack(outcomes)).max((2, 3))
    assert nearest.min(1).max() < 1e-5
    chosen = np.bincount(nearest.argmin(1), minlength=4) / images
    np.testing.assert_allclose(chosen, 0.25, atol=0.15)
    # The same key, the same outcome, in any place.
    np.testing.assert_allclose(
        block({"params": params}, x, keys[::-1])[::-1], y, atol=1e-5
    )


def plan_of(devices=1, **overrides):
    config = pretrain_config(**VIT, **overrides)
    mesh = create_mesh(jax.devices()[:devices])
    return create_plan(config, mesh, num_classes=10, num_examples=1297)


def test_a_step_skips_blocks(two_blocks):
    rates = ({}, {"encoder.stochastic_depth": 0.1}, {"encoder.stochastic_depth": 0.2})
    programs = [plan_of(**rate).lower().as_text() for rate in rates]
    assert len({*programs}) == 3


@pytest.mark.slow
def test_the_blocks_skipped_do_not_depend_on_the_devices(two_blocks):
    """Nor on the parts in which a batch is encoded."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (16, 1, 8, 8, 3), np.uint8),
        "label": np.arange(16, dtype=np.int32) % 4,
        "id": np.stack([np.zeros(16), np.arange(16)], 1).astype(np.int32),
    }

    def loss(devices, rate, microbatch_size=0):
        plan = plan_of(
            devices,
            **{"encoder.stochastic_depth": rate, "microbatch_size": microbatch_size},
        )
        state = jax.jit(plan.init)()
        _, metrics = plan.jit_step()(plan.seed_on_devices(), state, batch)
        return float(metrics["train/loss"])

    alone = loss(1, 0.5)
    assert loss(8, 0.5) == pytest.approx(alone, abs=1e-5)
    assert loss(1, 0.5, microbatch_size=8) == pytest.approx(alone, abs=1e-5)
    assert abs(loss(1, 0.0) - alone) > 1e-4


def test_positions_that_do_not_fit_stay_as_they_are():
    positions = jnp.ones((1, 17, 4))
    assert resize_positions(positions, (1, 17, 4)) is positions
    for shape in ((1, 16, 4), (1, 26, 5), (1, 19, 4)):
        assert resize_positions(positions, shape).shape == (1, 17, 4)
    assert resize_positions(positions, (1, 26, 4)).shape == (1, 26, 4)


@pytest.mark.slow
def test_it_trains_over_devices(tmp_path):
    config = pretrain_config(
        **{
            "encoder.name": "vit_tiny_patch4",
            "encoder.stem": "imagenet",
            "encoder.stochastic_depth": 0.1,
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 1e-3,
            "optimizer.exclude": ("norm", "bias"),
            "total_steps": 60,
        }
    )
    final = pretrain.pretrain(config, tmp_path)
    assert np.isfinite(final["train/loss"]) and final["knn/top1"] > 0.5
