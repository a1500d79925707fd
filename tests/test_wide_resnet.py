"""Wide ResNets: known sizes, and a forward pass block by block in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import pretrain
from supcon_jax.models import WideResNet, create_encoder
from tests.runs import pretrain_config
from tests.test_resnet import abstract_init, count, numpy_conv, random_variables

# As public implementations count them for 10 classes, less the classifier of D * 10 + 10.
KNOWN = {
    "wrn28_10": 36_479_194 - 6_410,
    "wrn28_2": 1_467_610 - 1_290,
    "wrn40_2": 2_243_546 - 1_290,
    "wrn16_4": 2_748_890 - 2_570,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts_and_output_shapes(name):
    widening = int(name.split("_")[1])
    output, variables = abstract_init(create_encoder(name, stem="cifar"))
    assert count(variables["params"]) == KNOWN[name]
    assert output.shape == (2, 64 * widening) and output.dtype == jnp.float32


def test_width_multiplies_all_channels():
    output, variables = abstract_init(create_encoder("wrn16_4", width=0.5))
    assert output.shape == (2, 128)
    assert variables["params"]["conv_stem"]["kernel"].shape == (7, 7, 3, 8)
    with pytest.raises(ValueError, match="--config.encoder.width"):
        create_encoder("wrn16_4", width=0.01)


def numpy_forward(variables, images, *, train):
    """Two groups of blocks with their shortcuts, written out."""
    params, stats = jax.tree.map(
        functools.partial(np.asarray, dtype=np.float64),
        (variables["params"], variables["batch_stats"]),
    )

    def norm_relu(x, p, s):
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else s.values()
        y = (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]
        return np.maximum(y, 0)

    x = numpy_conv(images, params["conv_stem"]["kernel"], 1)
    for group, strides in ((1, 1), (2, 2), (3, 2)):
        for index in (1, 2):
            name = f"stage{group}_block{index}"
            p, s = params[name], stats[name]
            strides = strides if index == 1 else 1
            y = norm_relu(x, p["batch_norm1"], s["batch_norm1"])
            if "conv_shortcut" in p:
                x = numpy_conv(y, p["conv_shortcut"]["kernel"], strides)
            y = numpy_conv(y, p["conv1"]["kernel"], strides)
            y = norm_relu(y, p["batch_norm2"], s["batch_norm2"])
            x = x + numpy_conv(y, p["conv2"]["kernel"], 1)
    x = norm_relu(x, params["batch_norm_out"], stats["batch_norm_out"])
    return x.mean((1, 2))


@pytest.mark.parametrize("train", [False, True])
def test_forward_pass_equals_numpy(train):
    encoder = WideResNet(depth=16, channels=(3, 4, 5), stem_channels=3)
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    variables = random_variables(encoder, images)
    apply = functools.partial(encoder.apply, train=train, mutable=["batch_stats"])
    embeddings, _ = jax.jit(apply)(variables, images)
    expected = numpy_forward(variables, images, train=train)
    np.testing.assert_allclose(embeddings, expected, rtol=2e-4, atol=1e-4)
    # The first block of group 1 keeps three channels: its shortcut is the identity.
    assert "conv_shortcut" not in variables["params"]["stage1_block1"]


@pytest.mark.slow
@pytest.mark.slow
def test_bfloat16_and_remat():
    encoder = create_encoder("wrn16_4", stem="cifar", width=0.25, dtype=jnp.bfloat16)
    images = jnp.ones((2, 8, 8, 3))
    variables = encoder.init(jax.random.key(0), images, train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.float32.dtype}
    plain = create_encoder("wrn16_4", stem="cifar", width=0.25)
    kept = create_encoder("wrn16_4", stem="cifar", width=0.25, remat=True)
    outputs = [m.apply(variables, images, train=False) for m in (plain, kept)]
    np.testing.assert_allclose(*outputs, rtol=1e-6)
    low = encoder.apply(variables, images, train=False)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, outputs[0], rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.slow
def test_it_trains_over_devices(tmp_path):
    config = pretrain_config(**{"encoder.name": "wrn16_4", "encoder.width": 0.1})
    final = pretrain.pretrain(config, tmp_path)
    assert np.isfinite(final["train/loss"]) and final["knn/top1"] > 0.1
