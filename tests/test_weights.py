"""Weights of other programs: files are read without running them, outputs are PyTorch's."""

import argparse
import functools
import io
import json
import logging
import os
import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supcon_jax
from supcon_jax import finetune, linear_eval, pretrain
from supcon_jax.checkpoint import Checkpointer, digest
from supcon_jax.inference import export
from supcon_jax.models import ENCODERS, ResNet, create_encoder
from supcon_jax.models.convolution import stem_pool
from supcon_jax.models.resnet import BasicBlock, BottleneckBlock
from supcon_jax.models.vit import resize_positions
from supcon_jax.pretrained import model as pretrained
from supcon_jax.pretrained.initial import load_weights
from supcon_jax.run.loop import restore_or_init
from supcon_jax.run.opening import open_run
from supcon_jax.run.workdir import leave, read_facts
from supcon_jax.weights import (
    from_state_dict,
    layouts,
    read_weights,
    to_state_dict,
    write_safetensors,
)
from tests.photos import photo
from tests.runs import (
    RESNET,
    assert_trees_equal,
    linear_config,
    pretrain_config,
    save_made_up,
)
from tests.test_defaults import write_photos
from tests.test_finetune import finetune_config
from tests.torch_weights import (
    MODELS,
    SIDE,
    TESTDATA,
    images,
    torch_outputs,
    values,
)


def shapes_of(encoder, side=SIDE):
    init = functools.partial(encoder.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3)))


def ruled(name, encoder, side=SIDE):
    """A state dict by `torch_weights.values` for an encoder."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape), shapes_of(encoder, side))
    named = to_state_dict(name, zeros["params"], zeros.get("batch_stats", {}))
    return {key: values(key, array.shape) for key, array in named.items()}


def outputs(name, encoder, state_dict, images):
    params, batch_stats = from_state_dict(
        name, state_dict, shapes_of(encoder, images.shape[1])
    )
    variables = {"params": params, "batch_stats": batch_stats}
    return jax.jit(functools.partial(encoder.apply, train=False))(variables, images)


def encoder_of(name, side=SIDE):
    encoder = create_encoder(name, image_size=side)
    return encoder if "vit" in name else encoder.clone(convention="torchvision")


# --- outputs ---


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_that_pytorch_gave(name):
    """Kept in testdata/weights.json by tests/torch_weights.py."""
    encoder = encoder_of(name)
    got = outputs(name, encoder, ruled(name, encoder), images())
    expected = json.loads((TESTDATA / "weights.json").read_text())[name]
    np.testing.assert_allclose(got[:, ::16], expected, atol=2e-5)


def test_the_convention_is_where_the_max_pool_pads():
    """Against a loop over windows; PyTorch pads one pixel on both sides."""
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype(np.float32)
    for convention, low in {"official": 0, "torchvision": 1}.items():
        padded = np.pad(x, ((0, 0), (low, 1), (low, 1), (0, 0)), constant_values=-9)
        expected = [
            [padded[0, i : i + 3, j : j + 3].max((0, 1)) for j in (0, 2, 4)]
            for i in (0, 2, 4)
        ]
        np.testing.assert_array_equal(stem_pool(x, convention)[0], expected)


@pytest.mark.parametrize(
    "block, projects", [(BasicBlock, False), (BottleneckBlock, True)]
)
def test_the_convention_is_where_shortcuts_are_projections(block, projects):
    for convention, expected in (("official", True), ("torchvision", projects)):
        encoder = ResNet((1, 1), block, 4, stem="cifar", convention=convention)
        params = shapes_of(encoder, 8)["params"]
        assert ("conv_shortcut" in params["stage1_block1"]) == expected
        assert "conv_shortcut" in params["stage2_block1"]


@pytest.mark.parametrize("name", ["resnet8", "wrn16_4", "vit_tiny_patch16"])
def test_names_go_there_and_back(name):
    encoder = create_encoder(name, width=1 / 16, image_size=SIDE)
    shapes = shapes_of(encoder)
    drawn = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(size=x.shape), shapes
    )
    drawn = jax.tree.map(np.float32, {"batch_stats": {}, **drawn})
    head = {"kernel": np.ones((7, 3), np.float32), "bias": np.ones(3, np.float32)}
    named = to_state_dict(name, **drawn, classifier=head)
    classifier = "head" if "vit" in name else "fc"
    assert named[f"{classifier}.weight"].shape == (3, 7)
    for prefix in ("", "module.", "encoder.module."):
        wrapped = {prefix + key: array for key, array in named.items()}
        if prefix.startswith("encoder"):  # SupContrast
            wrapped = {
                key.replace(".downsample.", ".shortcut."): array
                for key, array in wrapped.items()
            }
        wrapped |= {
            "head.0.weight": head["kernel"],
            prefix + "bn1.num_batches_tracked": 1,
        }
        params, batch_stats = from_state_dict(name, wrapped, shapes)
        assert_trees_equal({"params": params, "batch_stats": batch_stats}, drawn)


def test_positions_are_resized_and_nothing_else():
    small, large = (encoder_of("vit_tiny_patch16", side) for side in (64, 96))
    named = ruled("vit_tiny_patch16", small)
    params, _ = from_state_dict("vit_tiny_patch16", named, shapes_of(large, 96))
    resized = params["positions_stem"]
    assert resized.shape == (1, 37, 192)
    np.testing.assert_array_equal(resized[:, 0], named["pos_embed"][:, 0])
    # A constant stays one, and the mean of the whole barely moves.
    means = resized[:, 1:].mean(1), named["pos_embed"][:, 1:].mean(1)
    np.testing.assert_allclose(*means, atol=0.12)
    assert params["norm_out"]["scale"].shape == (192,)


# --- with PyTorch itself ---


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def zoo(torch):
    """`torchvision.models` and `timm`, in evaluation mode and with trained-like values."""
    try:
        import torchvision
    except ImportError:
        pytest.skip("needs torchvision")
    except RuntimeError:  # built for another torch: its models need no operators
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision
    timm = pytest.importorskip("timm")

    def make(source, name, **options):
        makers = {
            "timm": timm.create_model,
            "torchvision": torchvision.models.get_model,
        }
        model = makers[source](name, **options)
        state = {
            key: torch.from_numpy(np.asarray(values(key, tensor.shape)))
            for key, tensor in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        model.load_state_dict(state, strict=False)
        return model.eval()

    return make


def photos(side):
    """Two real photos as ImageNet's encoders take them."""
    both = np.stack([photo(name, side) for name in ("china", "flower")])
    return (both - [0.485, 0.456, 0.406]) / np.float32([0.229, 0.224, 0.225])


CASES = {
    "torchvision/resnet18": ("resnet18", 224, {}),
    "torchvision/resnet34": ("resnet34", 96, {}),
    "torchvision/resnet50": ("resnet50", 224, {}),
    "torchvision/resnet101": ("resnet101", 64, {}),
    "torchvision/resnet152": ("resnet152", 64, {}),
    "timm/resnet50": ("resnet50", 96, {}),
    "timm/vit_tiny_patch16_224": ("vit_tiny_patch16", 224, {}),
    "timm/vit_small_patch16_224": ("vit_small_patch16", 224, {}),
    "timm/vit_base_patch16_224": ("vit_base_patch16", 224, {}),
    "timm/vit_small_patch32_224": ("vit_small_patch32", 96, {"img_size": 96}),
    "timm/vit_tiny_patch16_224 mean": (
        *("vit_tiny_patch16", 96),
        {"img_size": 96, "class_token": False, "global_pool": "avg"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_pytorchs(case, zoo, torch, tmp_path):
    """From a .pth file in, and back into PyTorch by a .safetensors file."""
    name, side, options = CASES[case]
    source, _, theirs = case.split(" ")[0].partition("/")
    if source == "timm":
        options = options | {"num_classes": 0}
    model = zoo(source, theirs, **options)
    if source == "torchvision":
        model.fc = torch.nn.Identity()
    pixels = photos(side).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    encoder = encoder_of(name, side)
    if "class_token" in options:
        encoder = encoder.clone(class_token=False)
    arrays = read_weights(tmp_path / "weights.pth").arrays
    got = outputs(name, encoder, arrays, pixels)
    scale = np.abs(expected).max()
    print(
        f"{case} at {side}: {np.abs(got - expected).max() / scale:.1e} of {scale:.3g}"
    )
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, scale))

    named = to_state_dict(
        name, *from_state_dict(name, arrays, shapes_of(encoder, side))
    )
    write_safetensors(tmp_path / "back.safetensors", named, metadata={"format": "pt"})
    files = pytest.importorskip("safetensors.torch")
    model.load_state_dict(files.load_file(tmp_path / "back.safetensors"), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["torchvision/resnet18", "torchvision/resnet50", "timm/vit_tiny_patch16_224"],
)
def test_an_exported_run_gives_the_same_in_pytorch(case, zoo, torch, tmp_path):
    """A finished run's classifier, exported, in torchvision's and timm's own networks."""
    name, _, options = CASES[case]
    source, _, theirs = case.partition("/")
    changes = {"loss.name": "cross_entropy", "encoder.name": name}
    changes |= {"encoder.stem": "imagenet", "data.name": "folder", "batch_size": 16}
    write_photos(tmp_path / "photos", side=32)
    changes |= {"data.root": str(tmp_path / "photos"), "data.validation_fraction": 0.2}
    changes |= {"data.image_size": 32, "data.eval_resize": 32}
    if source == "torchvision":
        changes["encoder.convention"] = "torchvision"
    else:
        options = {"img_size": 32}
    config = pretrain_config(**changes)
    config.encoder.width = 1.0
    save_made_up(config, tmp_path / "run")
    model = supcon_jax.load_model(tmp_path / "run")
    written = export.write_weights(tmp_path, model)
    assert written.left_out == ""

    network = zoo(source, theirs, num_classes=len(model.class_names), **options)
    files = pytest.importorskip("safetensors.torch")
    network.load_state_dict(files.load_file(tmp_path / written.name), strict=False)
    pixels = photos(32).astype(np.float32)
    with torch.no_grad():
        got = network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    embeddings = model.trained.encoder.apply(
        model.trained.variables["encoder"], pixels, train=False
    )
    expected = model.logits(embeddings)
    scale = np.abs(expected).max()
    print(f"{case}: {np.abs(got - expected).max() / scale:.1e} of {scale:.3g}")
    np.testing.assert_allclose(got / scale, expected / scale, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 160, 384])
def test_positions_are_resized_as_timm_does(side, torch):
    vit = pytest.importorskip("timm.layers")
    positions = values("pos_embed", (1, 197, 192))
    count = (side // 16) ** 2 + 1
    expected = vit.resample_abs_pos_embed(
        torch.from_numpy(positions), (side // 16, side // 16)
    )
    got = resize_positions(jnp.asarray(positions), (1, count, 192))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_wide_resnets_are_pytorchs(torch):
    """Against a network with the names of WideResNet-pytorch, written here."""
    nn, name = torch.nn, "wrn16_4"

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            if inputs != outputs:
                self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x):
            y = torch.relu(self.bn1(x))
            x = self.convShortcut(y) if hasattr(self, "convShortcut") else x
            return x + self.conv2(torch.relu(self.bn2(self.conv1(y))))

    class Group(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.layer = nn.Sequential(
                Block(inputs, outputs, stride), Block(outputs, outputs, 1)
            )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.block1, self.block2 = Group(16, 64, 1), Group(64, 128, 2)
            self.block3, self.bn1 = Group(128, 256, 2), nn.BatchNorm2d(256)
            self.fc = nn.Linear(256, 10)

        def forward(self, x):
            x = self.conv1(x)
            for group in (self.block1, self.block2, self.block3):
                x = group.layer(x)
            return torch.relu(self.bn1(x)).mean((2, 3))

    expected = torch_outputs(net := Net(), images(side=32))
    arrays = {key: tensor.numpy() for key, tensor in net.state_dict().items()}
    encoder = create_encoder(name, stem="cifar")
    got = outputs(name, encoder, arrays, images(side=32))
    np.testing.assert_allclose(got, expected, atol=1e-4)


# --- files ---


def test_files_of_pytorch_are_read_without_it():
    """Of both kinds; tests/torch_weights.py has written them."""
    base = np.arange(24, dtype=np.float32)
    for kind in ("zip", "row"):
        arrays, metadata = read_weights(TESTDATA / f"weights_{kind}.pth")
        assert metadata == {}
        assert list(arrays) == [
            f"module.{n}" for n in ("matrix", "half", "brain", "count")
        ]
        np.testing.assert_array_equal(arrays["module.matrix"], base.reshape(4, 6).T[1:])
        assert arrays["module.half"].dtype == np.float16
        assert arrays["module.brain"].dtype == jnp.bfloat16
        assert arrays["module.count"] == 7


class Evil:
    """What makes unpickling run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refusal(path):
    with pytest.raises(ValueError) as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    evil = pickle.dumps({"a": Evil(f"touch {tmp_path}/was_here")}, protocol=2)
    (tmp_path / "row.pth").write_bytes(evil)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("archive/data.pkl", evil)
    for name in ("row.pth", "zip.pth"):
        message = refusal(tmp_path / name)
        assert (
            f"{os.system.__module__}.system" in message and "nothing was run" in message
        )
    assert not (tmp_path / "was_here").exists()
    pickle.loads(evil)  # it would have
    assert (tmp_path / "was_here").exists()


def test_damaged_and_other_files_are_refused(tmp_path):
    whole = (TESTDATA / "weights_zip.pth").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("photos/cat.jpg", b"")
    long = (1 << 40).to_bytes(8, "little") + b"{"
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    for content, says in {
        whole[: len(whole) // 2]: "damaged",
        (TESTDATA / "weights_row.pth").read_bytes()[:-20]: "outside of its storage",
        buffer.getvalue(): "without the data.pkl",
        pickle.dumps([1], protocol=2): "not one of torch.save",
        b"<html>not found</html>": "neither",
        b"": "neither",
        long: "cut off",
        len(header).to_bytes(8, "little") + header: "cut off",
        len(header).to_bytes(8, "little") + header.replace(b"F32", b"F8X") + b"8" * 8: (
            "F8X"
        ),
    }.items():
        (tmp_path / "file").write_bytes(content)
        message = refusal(tmp_path / "file")
        assert says in message and "cannot take weights from" in message, message
    assert "No such file" in refusal(tmp_path / "none")


def test_the_options_of_a_run_are_no_danger(tmp_path):
    """SupContrast saves them beside the weights; nothing of them is kept."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {}]
    tree = {"opt": argparse.Namespace(model="resnet50"), "acc": np.float64(0.5)}
    dumped = [pickle.dumps(part, protocol=2) for part in (*parts, tree, [])]
    (tmp_path / "row.pth").write_bytes(b"".join(dumped))
    assert "no tensors, but 'opt', 'acc'; allowed" in refusal(tmp_path / "row.pth")


def test_safetensors_there_and_back(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int64),
        "c": np.asarray([1.5], jnp.bfloat16),
        "d": np.float32(2),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays, metadata={"convention": "official"})
    found, metadata = read_weights(path)
    assert metadata == {"convention": "official"} and list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_safetensors_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, "i8")}
    write_safetensors(tmp_path / "ours", arrays, metadata={"format": "pt"})
    package.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    for found in (
        package.load_file(tmp_path / "ours"),
        read_weights(tmp_path / "theirs").arrays,
    ):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


# --- runs ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small encoder as another program would have it: `(path, variables)`."""
    config = pretrain_config(**RESNET | {"encoder.convention": "torchvision"})
    encoder = create_encoder("resnet8", width=config.encoder.width, stem="cifar")
    named = ruled("resnet8", encoder, 8)
    params, batch_stats = from_state_dict("resnet8", named, shapes_of(encoder, 8))
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    write_safetensors(path, {f"encoder.{k}": array for k, array in named.items()})
    return str(path), {"params": params, "batch_stats": batch_stats}


def test_all_modes_start_from_a_file(weights, tmp_path, caplog):
    path, expected = weights
    start = {"encoder.init_from": path, "encoder_average.decay": 0.9}
    loaders = {
        "pretrain": (pretrain_config(**RESNET | start), load_weights),
        "finetune": (finetune_config("", **start), finetune.load_initial_encoder),
    }
    with caplog.at_level(logging.INFO, logger="supcon_jax"):
        runs = {
            mode: open_run(config, tmp_path / mode, load_initial=load)
            for mode, (config, load) in loaders.items()
        }
    for mode, run in runs.items():
        assert_trees_equal(run.initial_encoder, expected)
        assert read_facts(tmp_path / mode)["frozen"] == digest((run.initial_encoder,))
    count = len(jax.tree.leaves(expected))
    assert caplog.text.count(f"starts with {count} arrays of {path}") == 2
    probe = linear_config("", **RESNET | {"encoder.init_from": path})
    run = open_run(probe, tmp_path / "probe", load_frozen=lambda p: (load_weights(p),))
    assert_trees_equal(run.frozen[0], expected)


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_read_the_weights_again(weights, tmp_path):
    path, expected = weights
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(open(path, "rb").read())
    config = pretrain_config(
        **RESNET | {"encoder.init_from": str(moved), "encoder_average.decay": 0.9}
    )
    run = open_run(config, tmp_path / "run", load_initial=load_weights)
    noted = read_facts(tmp_path / "run")["frozen"]
    checkpointer = Checkpointer(run.workdir)
    state, _ = restore_or_init(checkpointer, run.plan, run.initial_encoder)
    assert_trees_equal(state.encoder_variables(), expected)
    assert_trees_equal(state.encoder_average, expected)
    checkpointer.save(state, 3, {})
    checkpointer.close()
    leave(run.workdir)
    moved.unlink()
    pretrained.check_pretrained(config)
    again = open_run(config, tmp_path / "run", load_initial=load_weights)
    assert again.initial_encoder is None
    assert read_facts(tmp_path / "run")["frozen"] == noted
    leave(run.workdir)
    with pytest.raises(ValueError, match="differing: encoder.init_from"):
        config.encoder.init_from = path
        open_run(config, tmp_path / "run", load_initial=load_weights)


@pytest.mark.slow
def test_a_probe_of_weights_is_a_run_like_any_other(weights, tmp_path):
    path, expected = weights
    config = linear_config(
        "", **RESNET | {"encoder.init_from": path, "probe.solver": "lbfgs"}
    )
    config.total_steps = 0
    final = linear_eval.linear_eval(config, tmp_path / "probe")
    assert final["eval/top1"] > 0.5
    assert (tmp_path / "probe" / "features").is_dir()
    mesh = open_run(config, tmp_path / "other", load_frozen=lambda p: ()).mesh
    model = pretrained.load_model(str(tmp_path / "probe"), mesh)
    assert_trees_equal(model.variables["encoder"], expected)
    with pytest.raises(ValueError, match="has its encoder from .*resnet8.safetensors"):
        pretrained.find_encoder(str(tmp_path / "probe"))


def test_a_workdir_is_weights_too(weights, tmp_path):
    path, _ = weights
    config = pretrain_config(**RESNET | {"encoder.init_from": path})
    run = open_run(config, tmp_path / "first", load_initial=load_weights)
    checkpointer = Checkpointer(run.workdir)
    state, _ = restore_or_init(checkpointer, run.plan, run.initial_encoder)
    checkpointer.save(state, 12, {})
    checkpointer.close()
    leave(run.workdir)
    second = pretrain_config(**RESNET | {"encoder.init_from": str(tmp_path / "first")})
    pretrained.check_pretrained(second)
    run = open_run(second, tmp_path / "second", load_initial=load_weights)
    assert_trees_equal(run.initial_encoder, state.encoder_variables())
    second.encoder.convention = "torchvision"
    with pytest.raises(
        ValueError, match="convention.*another --config.encoder.init_from"
    ):
        pretrained.check_pretrained(second)


def test_the_nearest_encoder_is_named(weights, monkeypatch):
    known = {name: ENCODERS[name] for name in ("resnet8", "resnet18")}
    monkeypatch.setattr(layouts, "ENCODERS", known)
    arrays = read_weights(weights[0]).arrays
    ours = create_encoder("resnet18", stem="cifar").clone(convention="torchvision")
    whole = ruled("resnet18", ours)
    found = []
    for named in (arrays, {f"net.{k}": array for k, array in whole.items()}):
        encoder = create_encoder("resnet18", width=0.5)
        with pytest.raises(ValueError, match="and .* more; ") as refused:
            from_state_dict("resnet18", named, shapes_of(encoder))
        found.append(str(refused.value).rpartition("; ")[2])
    assert re.match("nearest, with .* differ: --config.encoder.name=resnet8 ", found[0])
    assert found[1] == (
        "they are those of --config.encoder.name=resnet18 --config.encoder.stem=cifar "
        "--config.encoder.convention=torchvision"
    )
    with pytest.raises(ValueError, match="no encoder's that is known here .a, ...."):
        from_state_dict("resnet18", {"a": np.ones(3)}, shapes_of(encoder))


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"encoder.width": 0.5},
            r"conv1.weight \(4, 3, 3, 3\), resnet8's \(8, 3, 3, 3\)",
        ),
        ({"encoder.name": "wrn16_4"}, "and .* more"),
        ({"encoder.stem": "imagenet"}, "set --config.encoder.convention=torchvision"),
        ({"encoder.init_from": "none.pth"}, "cannot read none.pth: No such file"),
        ({"mode": "linear_eval", "pretrained": "random"}, "one of them"),
        ({"mode": "linear_eval", "representation": "projection"}, "an encoder alone"),
        ({"mode": "linear_eval", "encoder_average.use": True}, "holds one encoder"),
        ({"mode": "evaluate"}, "takes the model of a run"),
    ],
    ids=str,
)
def test_what_cannot_start_is_refused_in_one_line(
    weights, changes, says, tmp_path, monkeypatch
):
    monkeypatch.setattr(layouts, "ENCODERS", {"resnet8": ENCODERS["resnet8"]})
    config = pretrain_config(**RESNET | {"encoder.init_from": weights[0], **changes})
    run = {"linear_eval": linear_eval.linear_eval, "evaluate": finetune.finetune}
    with pytest.raises(ValueError, match=says) as refused:
        run.get(config.mode, pretrain.pretrain)(config, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
