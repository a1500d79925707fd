"""Encoders: sizes, a forward pass in NumPy, BatchNorm across devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import parallel
from supcon_jax.models import ProjectionHead, ResNet, convolution, create_encoder
from supcon_jax.models.resnet import BasicBlock, BottleneckBlock


def abstract_init(encoder, size=32):
    """Output and variables as shapes; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    init = functools.partial(encoder.init_with_output, train=True)
    return jax.eval_shape(init, jax.random.key(0), images)


def initialize(encoder, images):
    init = jax.jit(functools.partial(encoder.init, train=False))
    return init(jax.random.key(0), images)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- sizes ---

# torchvision's (timm's for 200) counts less their classifiers of D * 1000 + 1000.
TORCHVISION = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
    "resnet200": 64_673_832 - 2_049_000,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameter_counts_and_output_shapes(name):
    basic = name in ("resnet18", "resnet34")
    # The official code projects the first shortcut of stage 1 too, where torchvision's
    # basic blocks keep the identity: a 1x1 convolution 64 to 64 and a BatchNorm.
    extra = 64 * 64 + 2 * 64 if basic else 0
    output, variables = abstract_init(create_encoder(name))
    assert count(variables["params"]) == TORCHVISION[name] + extra
    assert output.shape == (2, 512 if basic else 2048)
    assert output.dtype == jnp.float32


def test_known_counts():
    _, variables = abstract_init(create_encoder("resnet50"))
    assert count(variables["params"]) == 23_508_032
    # Mean and variance of each BatchNorm; its scale and bias are as many parameters.
    assert count(variables["batch_stats"]) == 53_120
    _, variables = abstract_init(create_encoder("resnet18"))
    assert count(variables["params"]) == 11_176_512 + 4_224


def test_small_encoder_count():
    """Stem 3-16, stages of one block 16-16, 16-32, 32-64, all with a projection."""

    def block(inside, outside):
        convs = 9 * inside * outside + 9 * outside**2 + inside * outside
        return convs + 3 * 2 * outside

    expected = 27 * 16 + 2 * 16 + block(16, 16) + block(16, 32) + block(32, 64)
    output, variables = abstract_init(create_encoder("resnet8", stem="cifar"), size=8)
    assert count(variables["params"]) == expected == 77_680
    assert output.shape == (2, 64)


def test_cifar_stem_changes_the_stem_alone():
    _, imagenet = abstract_init(create_encoder("resnet18"))
    _, cifar = abstract_init(create_encoder("resnet18", stem="cifar"))
    assert imagenet["params"].pop("conv_stem")["kernel"].shape == (7, 7, 3, 64)
    assert cifar["params"].pop("conv_stem")["kernel"].shape == (3, 3, 3, 64)
    assert jax.tree.map(jnp.shape, imagenet) == jax.tree.map(jnp.shape, cifar)


@pytest.mark.parametrize(("width", "channels"), [(0.5, 32), (2.0, 128)])
def test_width_multiplies_all_channels(width, channels):
    output, variables = abstract_init(create_encoder("resnet50", width=width))
    assert output.shape == (2, 32 * channels)
    assert variables["params"]["conv_stem"]["kernel"].shape == (7, 7, 3, channels)
    middle = variables["params"]["stage3_block2"]["conv2"]["kernel"]
    assert middle.shape == (3, 3, 4 * channels, 4 * channels)


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [("imagenet", (56, 56, 28, 14, 7)), ("cifar", (224, 224, 112, 56, 28))],
)
def test_resolution_of_the_stages(stem, sizes):
    encoder = create_encoder("resnet50", stem=stem)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = functools.partial(
        encoder.init, train=True, capture_intermediates=True, mutable=True
    )
    captured = jax.eval_shape(init, jax.random.key(0), images)["intermediates"]
    stem_size = {"imagenet": 112, "cifar": 224}[stem]
    assert captured["conv_stem"]["__call__"][0].shape == (1, stem_size, stem_size, 64)
    for stage, size in enumerate(sizes[1:], start=1):
        block = captured[f"stage{stage}_block1"]
        shape = (1, size, size, 128 * 2**stage)
        assert block["__call__"][0].shape == shape
        # v1.5: the first 1x1 convolution still sees the stage's input resolution.
        before = sizes[max(stage - 1, 1)] if stage > 1 else size
        assert block["conv1"]["__call__"][0].shape[1] == before
        assert block["conv2"]["__call__"][0].shape[1] == size


# --- values: the whole network in NumPy ---


def numpy_conv(x, kernel, strides):
    """A convolution padded by (k - 1) / 2 on every side, position by position."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out_h = (x.shape[1] - size) // strides + 1
    out_w = (x.shape[2] - size) // strides + 1
    out = np.zeros((len(x), out_h, out_w, kernel.shape[-1]))
    for i in range(out_h):
        for j in range(out_w):
            top, left = i * strides, j * strides
            patch = x[:, top : top + size, left : left + size]
            out[:, i, j] = np.einsum("nhwc,hwcd->nd", patch, kernel)
    return out


def numpy_max_pool(x):
    """3x3 with stride 2, "SAME": an even side is padded at its end only."""
    assert x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    x = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    rows = range(0, x.shape[1] - 2, 2)
    columns = range(0, x.shape[2] - 2, 2)
    return np.stack(
        [
            np.stack([x[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns], 1)
            for i in rows
        ],
        axis=1,
    )


class NumpyResNet:
    def __init__(self, variables, encoder, *, train):
        to_numpy = functools.partial(np.asarray, dtype=np.float64)
        self.params = jax.tree.map(to_numpy, variables["params"])
        self.stats = jax.tree.map(to_numpy, variables["batch_stats"])
        self.encoder, self.train = encoder, train

    def norm(self, x, params, stats):
        if self.train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        else:
            mean, var = stats["mean"], stats["var"]
        return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]

    def block(self, x, name, strides):
        params, stats = self.params[name], self.stats[name]

        def conv_norm(x, conv, norm, strides=1):
            y = numpy_conv(x, params[conv]["kernel"], strides)
            return self.norm(y, params[norm], stats[norm])

        if self.encoder.block is BasicBlock:
            y = np.maximum(conv_norm(x, "conv1", "batch_norm1", strides), 0)
            y = conv_norm(y, "conv2", "batch_norm2")
        else:
            y = np.maximum(conv_norm(x, "conv1", "batch_norm1"), 0)
            y = np.maximum(conv_norm(y, "conv2", "batch_norm2", strides), 0)
            y = conv_norm(y, "conv3", "batch_norm3")
        if "conv_shortcut" in params:
            x = conv_norm(x, "conv_shortcut", "batch_norm_shortcut", strides)
        return np.maximum(x + y, 0)

    def __call__(self, images):
        imagenet = self.encoder.stem == "imagenet"
        kernel = self.params["conv_stem"]["kernel"]
        x = numpy_conv(images, kernel, 2 if imagenet else 1)
        name = "batch_norm_stem"
        x = np.maximum(self.norm(x, self.params[name], self.stats[name]), 0)
        if imagenet:
            x = numpy_max_pool(x)
        for stage, blocks in enumerate(self.encoder.stage_sizes, start=1):
            for index in range(1, blocks + 1):
                strides = 2 if stage > 1 and index == 1 else 1
                x = self.block(x, f"stage{stage}_block{index}", strides)
        return x.mean((1, 2))


def random_variables(encoder, images):
    """Every tensor random (init would hide the zero-scaled residual branches)."""
    init = functools.partial(encoder.init, train=False)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0), images))
    rng = np.random.default_rng(1)
    # Positive, for the variances; kernels about centred by the subtraction below.
    leaves = [rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) for leaf in leaves]
    variables = treedef.unflatten(leaves)
    variables["params"] = jax.tree.map(lambda x: x - 0.8, variables["params"])
    return variables


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_forward_pass_equals_numpy(block, stem, train):
    encoder = ResNet((2, 1), block, base_width=3, stem=stem)
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    variables = random_variables(encoder, images)
    apply = jax.jit(
        functools.partial(encoder.apply, train=train, mutable=["batch_stats"])
    )
    embeddings, updated = apply(variables, images)
    expected = NumpyResNet(variables, encoder, train=train)(images)
    np.testing.assert_allclose(embeddings, expected, rtol=2e-4, atol=1e-4)
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b),
        updated["batch_stats"],
        variables["batch_stats"],
    )
    assert all(jax.tree.leaves(changed)) if train else not any(jax.tree.leaves(changed))


def test_strided_convolution_pads_symmetrically():
    """By hand: "SAME" would pad the end only and give 45 in the first corner."""
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    layer = convolution.conv(1, 3, 2, dtype=jnp.float32, name=None)
    out = layer.apply({"params": {"kernel": jnp.ones((3, 3, 1, 1))}}, images)
    np.testing.assert_array_equal(out[0, :, :, 0], [[10, 24], [51, 90]])


# --- initial values ---


def test_initial_values():
    encoder = ResNet((1, 1), BottleneckBlock, base_width=64, stem="cifar")
    params = initialize(encoder, jnp.zeros((1, 8, 8, 3)))["params"]
    for name, block in params.items():
        if not name.startswith("stage"):
            continue
        # The residual branch starts switched off, the shortcut on.
        assert np.all(block["batch_norm3"]["scale"] == 0)
        assert np.all(block["batch_norm1"]["scale"] == 1)
        assert np.all(block["batch_norm2"]["scale"] == 1)
        if "batch_norm_shortcut" in block:
            assert np.all(block["batch_norm_shortcut"]["scale"] == 1)
    # variance_scaling(1, fan_in): variance 1 / (kernel area * channels in).
    kernel = np.asarray(params["stage2_block1"]["conv2"]["kernel"])
    np.testing.assert_allclose(kernel.std(), 1 / math.sqrt(9 * 128), rtol=0.01)
    # Truncated: nothing beyond two standard deviations of the untruncated normal.
    assert np.abs(kernel).max() < 2.3 * kernel.std()


def test_last_batch_norm_of_basic_blocks_starts_at_zero():
    encoder = ResNet((2,), BasicBlock, base_width=4, stem="cifar")
    variables = initialize(encoder, jnp.zeros((1, 8, 8, 3)))
    for block, params in variables["params"].items():
        if block.startswith("stage"):
            assert np.all(params["batch_norm2"]["scale"] == 0)
            assert np.all(params["batch_norm1"]["scale"] == 1)


# --- precision ---


def test_bfloat16_computes_low_and_keeps_high():
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    low = create_encoder("resnet8", stem="cifar", dtype=jnp.bfloat16)
    high = create_encoder("resnet8", stem="cifar")
    variables = random_variables(high, images)
    embeddings, updated = jax.jit(
        functools.partial(
            low.apply, train=True, mutable=True, capture_intermediates=True
        )
    )(variables, images)
    captured = updated.pop("intermediates")
    assert captured["conv_stem"]["__call__"][0].dtype == jnp.bfloat16
    assert captured["stage2_block1"]["conv2"]["__call__"][0].dtype == jnp.bfloat16
    assert captured["stage3_block1"]["__call__"][0].dtype == jnp.bfloat16
    assert embeddings.dtype == jnp.float32
    initial = jax.eval_shape(functools.partial(initialize, low), images)
    for tree in (initial, updated):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    apply = jax.jit(functools.partial(high.apply, train=True, mutable=["batch_stats"]))
    exact = apply(variables, images)[0]
    error = np.abs(embeddings - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_bfloat16_batch_norm_statistics_are_float32_sums():
    """A mean over 4,096 values: bfloat16 sums would stall at 256 and miss it."""
    encoder = ResNet((), BasicBlock, base_width=1, stem="cifar", dtype=jnp.bfloat16)
    images = jnp.ones((16, 16, 16, 3))
    variables = initialize(encoder, images)
    kernel = jnp.zeros((3, 3, 3, 1)).at[1, 1, 0, 0].set(1.0)  # passes red through
    variables["params"]["conv_stem"]["kernel"] = kernel
    _, updated = encoder.apply(variables, images, train=True, mutable=["batch_stats"])
    stats = updated["batch_stats"]["batch_norm_stem"]
    np.testing.assert_allclose(stats["mean"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9, rtol=1e-6)


# --- BatchNorm ---


def red_channel_encoder():
    """A stem that passes the red channel through, so that BatchNorm shows."""
    encoder = ResNet((), BasicBlock, base_width=1, stem="cifar")
    variables = initialize(encoder, jnp.zeros((1, 2, 2, 3)))
    kernel = jnp.zeros((3, 3, 3, 1)).at[1, 1, 0, 0].set(1.0)
    variables["params"]["conv_stem"]["kernel"] = kernel
    return encoder, variables


def test_batch_norm_momentum_and_epsilon():
    encoder, variables = red_channel_encoder()
    red = np.zeros((8, 2, 2), np.float32)
    red[4:] = 0.01  # mean 0.005, variance 0.005^2 = 2.5e-5: epsilon shows
    images = np.zeros((8, 2, 2, 3), np.float32)
    images[..., 0] = red
    out, updated = encoder.apply(variables, images, train=True, mutable=["batch_stats"])
    high = 0.005 / math.sqrt(2.5e-5 + 1e-5)
    np.testing.assert_allclose(out[:, 0], [0] * 4 + [high] * 4, rtol=1e-4)
    stats = updated["batch_stats"]["batch_norm_stem"]
    np.testing.assert_allclose(stats["mean"], 0.1 * 0.005, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * 2.5e-5, rtol=1e-6)


def test_batch_norm_statistics_are_global():
    """Each device holds one constant image: its own statistics would give zeros."""
    encoder, variables = red_channel_encoder()
    images = np.zeros((8, 2, 2, 3), np.float32)
    images[..., 0] = np.arange(8.0)[:, None, None]
    mesh = parallel.create_mesh()
    assert mesh.size == 8
    step = jax.jit(
        functools.partial(encoder.apply, train=True, mutable=["batch_stats"]),
        in_shardings=(parallel.replicated(mesh), parallel.batch_sharding(mesh)),
    )
    out, updated = step(variables, images)
    expected = np.maximum(np.arange(8) - 3.5, 0) / math.sqrt(5.25 + 1e-5)
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-5)
    stats = updated["batch_stats"]["batch_norm_stem"]
    np.testing.assert_allclose(stats["mean"], 0.35, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.525, rtol=1e-5)


def test_eight_devices_equal_one():
    """Embeddings, statistics and gradients of a whole encoder and head."""
    encoder = create_encoder("resnet8", stem="cifar", width=0.5)
    head = ProjectionHead(hidden_dims=(8,), output_dim=4, batch_norm=True)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 8, 8, 3)).astype(np.float32)
    variables = {"encoder": random_variables(encoder, images)}
    embeddings = jnp.zeros((1, 32))
    variables["head"] = head.init(jax.random.key(0), embeddings, train=True)
    targets = rng.normal(size=(16, 4)).astype(np.float32)

    def objective(params, batch):
        images, targets = batch
        full = {key: variables[key] | {"params": params[key]} for key in params}
        mutable = ["batch_stats"]
        x, encoder_stats = encoder.apply(
            full["encoder"], images, train=True, mutable=mutable
        )
        y, head_stats = head.apply(full["head"], x, train=True, mutable=mutable)
        return jnp.mean(jnp.square(y - targets)), (x, encoder_stats, head_stats)

    def run(num_devices):
        mesh = parallel.create_mesh(jax.devices()[:num_devices])
        step = jax.jit(
            jax.value_and_grad(objective, has_aux=True),
            in_shardings=(parallel.replicated(mesh), parallel.batch_sharding(mesh)),
            # As users compile: without, sums of products round otherwise on one device.
            compiler_options={"xla_backend_optimization_level": 3},
        )
        params = {key: value["params"] for key, value in variables.items()}
        return jax.device_get(step(params, (images, targets)))

    for one, eight in zip(*map(jax.tree.leaves, (run(1), run(8))), strict=True):
        # Relative to the tensor's size: single elements may cancel.
        scale = max(float(np.abs(one).max()), 1e-6)
        np.testing.assert_allclose(eight / scale, one / scale, atol=1e-5)


def test_remat_changes_memory_and_nothing_else():
    """The same parameters, values, statistics and gradients, from less that is kept."""
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    results, kept = [], []
    for remat in (False, True):
        encoder = create_encoder("resnet8", stem="cifar", width=0.25, remat=remat)
        init = functools.partial(encoder.init, train=True)
        variables = jax.jit(init)(jax.random.key(0), images)

        def loss(params, encoder=encoder, variables=variables):
            embeddings, stats = encoder.apply(
                variables | {"params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.sin(embeddings)), stats

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        results.append(gradient(variables["params"]))
        _, backward = jax.eval_shape(
            lambda params, loss=loss: jax.vjp(lambda p: loss(p)[0], params),
            variables["params"],
        )
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward)))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert kept[1] < 0.5 * kept[0]


def test_inference_sees_each_image_alone():
    encoder = create_encoder("resnet8", stem="cifar", width=0.25)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = random_variables(encoder, images)
    apply = jax.jit(encoder.apply, static_argnames="train")
    together = apply(variables, images, train=False)
    alone = apply(variables, images[2:3], train=False)
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-5, atol=1e-6)
