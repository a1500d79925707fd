"""What the loss costs and keeps: precision, devices, collectives, memory."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import supcon_loss, tiles
from supcon_jax.planning.flops import count_flops
from tests.aot import compiled_for_tpu

MIB = 2**20


def dense_loss(x, labels, temperature, summation="outside"):
    """The whole matrix at once, in the precision of x."""
    z = x.reshape(-1, x.shape[-1])
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    group = jnp.repeat(labels, x.shape[1])
    other = ~jnp.eye(len(z), dtype=bool)
    positive = (group[:, None] == group) & other
    logits = jnp.matmul(z, z.T, precision="highest") / temperature
    total = jax.nn.logsumexp(logits, axis=1, where=other)
    count = positive.sum(1)
    if summation == "outside":
        losses = total - jnp.where(positive, logits, 0).sum(1) / count
    else:
        losses = total - jax.nn.logsumexp(logits, axis=1, where=positive)
        losses += jnp.log(count)
    return losses.reshape(x.shape[:2]).mean(1)


def ordinary(num_images, dimension=32, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num_images).astype(np.int32)
    centers = rng.normal(size=(classes, 1, dimension))
    x = 0.7 * centers[labels] + rng.normal(size=(num_images, 2, dimension))
    return x.astype(np.float32), labels


def collapsed(num_images=1024, dimension=128, spread=0.03, seed=0):
    """Ten classes, each nearly a point: where class sums would cancel."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_images) % 10).astype(np.int32)
    centers = rng.normal(size=(10, 1, dimension))
    centers /= np.linalg.norm(centers, axis=-1, keepdims=True)
    noise = rng.normal(size=(num_images, 2, dimension)) / dimension**0.5
    return (centers[labels] + spread * noise).astype(np.float32), labels


def relative(a, b):
    """Norm of the difference to b, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def gradient_error(loss, x, labels, temperature, **options):
    """Relative to dense float64; the gradient reaches x through the normalisation."""
    gradient = np.asarray(jax.jit(jax.grad(lambda x: loss(x, labels)))(x))
    with jax.enable_x64(True):
        expected = jax.jit(
            jax.grad(lambda x: dense_loss(x, labels, temperature, **options).mean())
        )(x.astype(np.float64))
    return relative(gradient, np.asarray(expected))


@pytest.mark.parametrize(
    ("temperature", "summation"),
    [(0.07, "outside"), (0.07, "inside"), (0.1, "outside")],
)
def test_ordinary_gradient_is_exact_to_float32(temperature, summation):
    x, labels = ordinary(512, dimension=128)
    options = {"temperature": temperature, "summation": summation}
    loss = functools.partial(supcon_loss, block_size=200, **options)
    assert gradient_error(loss, x, labels, **options) < 3e-6


@pytest.mark.parametrize("num_images", [200, 256, 300])
def test_every_way_to_cut_the_matrix_is_exact(num_images):
    """One tile, two halves, four by four tiles; diagnostics are those of one tile."""
    x, labels = ordinary(num_images, dimension=64)
    assert gradient_error(supcon_loss, x, labels, 0.1) < 3e-6
    diagnostics = [
        jax.jit(functools.partial(supcon_loss, block_size=size, with_diagnostics=True))(
            x, labels
        )
        for size in (None, 97)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *diagnostics)


def collapsed_errors():
    x, labels = collapsed()
    streamed = functools.partial(supcon_loss, temperature=0.1)

    def dense(x, labels):
        return dense_loss(x, labels, 0.1).mean()

    return [gradient_error(loss, x, labels, 0.1) for loss in (streamed, dense)]


def test_collapsed_gradient_is_as_good_as_dense():
    error, dense_error = collapsed_errors()
    assert error < 1e-4
    assert error < 3 * dense_error


def test_collapsed_gradient_shows_a_lower_precision(monkeypatch):
    """The test above has teeth: one bfloat16 pass, the default of a TPU, fails it."""

    def one_pass(x, y):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    monkeypatch.setattr(tiles, "matmul", one_pass)
    assert collapsed_errors()[0] > 1e-2


def class_sum_gradient(x, labels, temperature):
    """The gradient as it is often written: the positives' part by sums over classes.

    With S_c the sum of a class and P the softmax over the others, dL/dz_i is
    `((P + P^T) z - 2 (S_c - z_i) / |P(i)|) / (N t)`, exact but for rounding.
    """
    n = x.shape[0] * x.shape[1]
    w = x.reshape(n, -1)
    group = jnp.repeat(labels, x.shape[1])
    norm = jnp.linalg.norm(w, axis=1, keepdims=True)
    z = w / norm
    highest = functools.partial(jnp.matmul, precision="highest")
    logits = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, highest(z, z.T) / temperature)
    softmax = jax.nn.softmax(logits, axis=1)
    onehot = jax.nn.one_hot(group, int(labels.max()) + 1)
    positives = jnp.sum(onehot, axis=0)[group][:, None] - 1
    sums = highest(onehot.T, z)[group] - z
    g = (highest(softmax + softmax.T, z) - 2 * sums / positives) / (n * temperature)
    g = (g - jnp.sum(g * z, axis=1, keepdims=True) * z) / norm
    return g.reshape(x.shape)


def test_collapsed_gradient_shows_class_sums():
    """So has it this: exact sums of nearly equal vectors that cancel afterwards."""
    x, labels = collapsed()
    with jax.enable_x64(True):
        wide = x.astype(np.float64)
        expected = jax.grad(lambda x: dense_loss(x, labels, 0.1).mean())(wide)
        formula = class_sum_gradient(jnp.asarray(wide), labels, 0.1)
        assert relative(np.asarray(formula), np.asarray(expected)) < 1e-9
    narrow = np.asarray(class_sum_gradient(jnp.asarray(x), labels, 0.1))
    assert relative(narrow, np.asarray(expected)) > 1e-4


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


OPTIONS = [
    {},
    {"summation": "inside"},
    {"temperature": 0.01},
    {"with_diagnostics": True},
    {"denominator": "one_positive"},
    {"positives_cap": 2},
]


def scalar_loss(x, labels, **options):
    loss = supcon_loss(x, labels, **options)
    return loss[0] if options.get("with_diagnostics") else loss


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_matrix_product_is_full_float32(options):
    x, labels = ordinary(32)
    loss = functools.partial(scalar_loss, labels=labels, **options)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(x).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) >= 2
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(product.params["precision"] == highest for product in products)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_array_is_n_by_n(options, monkeypatch):
    monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    x, labels = ordinary(256)
    loss = functools.partial(scalar_loss, labels=labels, block_size=32, **options)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(x).jaxpr
    largest = max(v.aval.size for e in equations(jaxpr) for v in e.outvars)
    # Row blocks of the rarer variants are 32 x N; everything else is smaller.
    assert largest <= 32 * 512


def test_kept_tiles_have_a_limit():
    """Small batches keep their tiles for the backward pass, which makes them once."""

    def products_and_bytes(num_images):
        x = jax.ShapeDtypeStruct((num_images, 2, 16), jnp.float32)
        labels = jax.ShapeDtypeStruct((num_images,), jnp.int32)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(supcon_loss))(x, labels).jaxpr
        found = list(equations(jaxpr))
        products = [e for e in found if e.primitive.name == "dot_general"]
        return len(products), 4 * max(v.aval.size for e in found for v in e.outvars)

    # Tiles on the diagonal: logits, gradient of the rows; off it also of the columns.
    kept, recomputed = products_and_bytes(1024), products_and_bytes(4096)
    assert kept[0] == 2 + 3
    assert recomputed[0] == 3 + 4
    assert 4 * MIB < kept[1] <= tiles.KEPT_BYTES
    assert recomputed[1] <= 4 * MIB


@pytest.mark.parametrize(
    "options", [{}, {"summation": "inside"}, {"with_diagnostics": True}], ids=str
)
def test_kept_and_recomputed_tiles_agree(options, monkeypatch):
    x, labels = ordinary(40, dimension=16)
    loss = functools.partial(scalar_loss, block_size=26, **options)
    kept = jax.jit(jax.value_and_grad(loss))(x, labels)
    monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    recomputed = jax.jit(jax.value_and_grad(lambda *a: loss(*a)))(x, labels)
    for a, b in zip(kept, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def compiled_memory(num_images, **options):
    x = jax.ShapeDtypeStruct((num_images, 2, 128), jnp.float32)
    labels = jax.ShapeDtypeStruct((num_images,), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(functools.partial(scalar_loss, **options)))
    return compiled.lower(x, labels).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
    small, large = compiled_memory(4096), compiled_memory(8192)
    # N = 16384: one N x N array would be 1024 MiB.
    assert large < 64 * MIB
    assert large < 2.1 * small


def test_memory_of_a_row_variant_is_linear():
    options = {"denominator": "one_positive", "block_size": 64}
    small, large = (compiled_memory(n, **options) for n in (2048, 4096))
    # N = 8192: one N x N array would be 256 MiB.
    assert large < 64 * MIB
    assert large < 2.1 * small


@pytest.mark.parametrize("block_size", [5, 17, 52])
def test_blocks_of_any_size(block_size):
    x, labels = ordinary(26, dimension=8)
    step = jax.jit(jax.value_and_grad(supcon_loss), static_argnames="block_size")
    expected = step(x, labels, block_size=1000)
    got = step(x, labels, block_size=block_size)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
        got,
        expected,
    )


@pytest.mark.parametrize(("block_size", "rows_of_a_block"), [(2048, 26), (24, 13)])
def test_rarer_variants_compute_no_rows_that_are_not_there(block_size, rows_of_a_block):
    x, labels = ordinary(13, dimension=8)

    def flops(block_size):
        options = {"denominator": "one_positive", "block_size": block_size}
        return count_flops(jax.grad(lambda x: supcon_loss(x, labels, **options)), x)

    assert flops(block_size) == flops(rows_of_a_block) == flops(26)


def make_mesh(num_devices):
    if jax.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices, this process has fewer")
    return jax.make_mesh(
        (num_devices,),
        ("data",),
        devices=jax.devices()[:num_devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )


def sharded(num_devices, **options):
    return jax.shard_map(
        functools.partial(supcon_loss, axis_name="data", **options),
        mesh=make_mesh(num_devices),
        in_specs=(P("data"), P("data")),
        out_specs=P("data") if options.get("reduction") == "none" else P(),
    )


def check_devices(num_devices, dtype, tolerance, **options):
    x, labels = ordinary(40, dimension=16)
    x, labels = (x / 4).astype(dtype), np.where(np.arange(40) == 3, -1, labels)
    with jax.enable_x64(dtype is np.float64):
        one = functools.partial(supcon_loss, block_size=48, **options)
        many = sharded(num_devices, block_size=7, **options)
        expected = jax.jit(jax.value_and_grad(one))(x, labels)
        got = jax.jit(jax.value_and_grad(many))(x, labels)
    assert relative(got[0], expected[0]) < tolerance
    assert relative(got[1], expected[1]) < tolerance


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 5e-6), (np.float64, 1e-13)]
)
def test_devices_change_nothing(num_devices, dtype, tolerance):
    check_devices(num_devices, dtype, tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"summation": "inside", "contrast_mode": "one", "scale": "temperature"},
        {"temperature": 0.01},
        pytest.param(
            {"normalize": False, "summation": "inside"}, marks=pytest.mark.slow
        ),
        pytest.param({"denominator": "only_negatives"}, marks=pytest.mark.slow),
        {"positives_cap": 4, "positives_key": 7},
    ],
    ids=str,
)
def test_devices_change_no_variant(options):
    if "positives_key" in options:
        options = options | {"positives_key": jax.random.key(7)}
    check_devices(4, np.float64, 1e-13, **options)


@pytest.mark.parametrize("options", [{}, {"denominator": "one_positive"}], ids=str)
def test_any_weights_on_the_anchors(options):
    """reduction="none": each loss may have its own cotangent, on 1 and 4 devices."""
    x, labels = ordinary(24, dimension=8)
    weight = np.random.default_rng(5).normal(size=24)
    with jax.enable_x64(True):
        x = x.astype(np.float64)
        loss = functools.partial(supcon_loss, reduction="none", block_size=13)

        @functools.partial(jax.jit, static_argnums=0)
        def pullback(loss, x):
            losses, vjp = jax.vjp(lambda x: loss(x, labels), x)
            return losses, vjp(weight)[0]

        one, expected = pullback(functools.partial(loss, **options), x)
        many, got = pullback(sharded(4, reduction="none", **options), x)
        np.testing.assert_allclose(many, one, rtol=1e-12)
        assert relative(got, expected) < 1e-13
        if not options:
            dense = jax.jit(jax.grad(lambda x: weight @ dense_loss(x, labels, 0.1)))(x)
            assert relative(expected, dense) < 1e-12


def test_gradient_inside_shard_map_and_of_shared_parameters():
    """jax.grad on either side of shard_map; parameters shared by all devices."""
    x, labels = ordinary(16, dimension=8)
    kernel = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)

    def loss(parameters, x, labels, axis_name=None):
        kernel, temperature = parameters
        return supcon_loss(
            x @ kernel, labels, temperature=temperature, axis_name=axis_name
        )

    inside = jax.shard_map(
        jax.grad(functools.partial(loss, axis_name="data")),
        mesh=make_mesh(4),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    outside = jax.grad(
        jax.shard_map(
            functools.partial(loss, axis_name="data"),
            mesh=make_mesh(4),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
    )
    parameters = (kernel, np.float32(0.2))
    expected = jax.jit(jax.grad(loss))(parameters, x, labels)
    for got in (inside, outside):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
            jax.jit(got)(parameters, x, labels),
            expected,
        )


def test_diagnostics_are_those_of_the_whole_batch():
    x, labels = ordinary(16, dimension=8)
    labels[:3] = -1
    expected = jax.jit(functools.partial(supcon_loss, with_diagnostics=True))(x, labels)
    got = jax.jit(sharded(4, with_diagnostics=True))(x, labels)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
    )


def test_global_arrays_under_jit():
    """Sharded arrays without shard_map: the compiler sees to the devices."""
    x, labels = ordinary(16, dimension=8)
    mesh = make_mesh(4)
    split = jax.sharding.NamedSharding(mesh, P("data"))
    step = jax.jit(
        jax.value_and_grad(supcon_loss), in_shardings=split, out_shardings=(None, split)
    )
    got = step(jax.device_put(x, split), jax.device_put(labels, split))
    expected = jax.jit(jax.value_and_grad(supcon_loss))(x, labels)
    assert relative(got[0], expected[0]) < 5e-6
    assert relative(got[1], expected[1]) < 5e-6


@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"denominator": "one_positive"}, {"positives_cap": 4}, {"reduction": "none"}],
    ids=str,
)
def test_global_arrays_with_explicit_axes(options, in_context):
    """jax.make_mesh makes such meshes; shardings are part of their arrays' types."""
    x, labels = ordinary(16, dimension=8)

    def loss(x, labels, temperature, key):
        given = {"positives_key": key} if "positives_cap" in options else {}
        return jnp.sum(
            supcon_loss(x, labels, temperature=temperature, **options, **given)
        )

    step = jax.value_and_grad(loss, argnums=(0, 2))
    scalars = (jnp.float32(0.2), jax.random.key(1))
    expected = jax.jit(step)(x, labels, *scalars)
    auto = make_mesh(4)
    mesh = jax.make_mesh((4,), ("data",), devices=auto.devices.flatten())
    split = jax.sharding.NamedSharding(mesh, P("data"))
    arrays = jax.device_put(x, split), jax.device_put(labels, split)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = jax.jit(step)(*arrays, *scalars)
    assert jax.typeof(got[1][0]).sharding.spec[0] == "data"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative(np.asarray(a), np.asarray(b)) < 5e-6


COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def large_collectives(hlo, at_least):
    """Kinds of the collectives that carry an array of this many elements."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", match[1])
            sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
            if max(sizes, default=0) >= at_least:
                found.append(match[2])
    return found


def sharded_gradient_collectives(mesh, num_images, dimension, **options):
    split = jax.sharding.NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((num_images, 2, dimension), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((num_images,), jnp.int32, sharding=split)
    loss = jax.shard_map(
        functools.partial(supcon_loss, axis_name="data", block_size=64, **options),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, labels).compile()
    # One device's share of the N x D embeddings is the smallest of such arrays.
    share = num_images * 2 * dimension // mesh.size
    return large_collectives(compiled.as_text(), share)


@pytest.mark.parametrize("options", [{}, {"summation": "inside"}], ids=str)
def test_backward_has_no_large_collective(options):
    """One gathering of the embeddings, in the forward pass, is all that travels."""
    found = sharded_gradient_collectives(make_mesh(8), 64, 64, **options)
    assert found == ["all-gather"]


def test_automatic_differentiation_has_a_large_collective_more():
    """So the test above can fail: the rarer variants do send an N x D gradient back."""
    found = sharded_gradient_collectives(
        make_mesh(8), 64, 64, denominator="one_positive"
    )
    assert len(found) == 2


def test_memory_of_a_device_is_small():
    """N = 8192 over 8 devices."""
    mesh = make_mesh(8)
    split = jax.sharding.NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((4096, 2, 128), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32, sharding=split)
    step = jax.jit(jax.value_and_grad(sharded(8)))
    memory = step.lower(x, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * MIB


@pytest.mark.aot
def test_backward_has_no_large_collective_on_a_tpu():
    """Compiled for eight TPU v5e chips, which need not be there."""
    found = compiled_for_tpu(
        "from tests import test_losses_scaling as scaling\n"
        "print('found', scaling.sharded_gradient_collectives(mesh, 512, 128))"
    )
    # The compiler may turn a small gathering into a sum over zero-padded arrays.
    assert found in ("['all-gather']", "['all-reduce']")
