"""Exported files give what the run gives, and a failed export leaves nothing."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supcon_jax
from supcon_jax import linear_eval
from supcon_jax.data.datasets import open_source
from supcon_jax.data.images import central_crop
from supcon_jax.inference import export
from supcon_jax.inference.model_card import describe, write_card
from supcon_jax.models import EncoderWithProjection, ProjectionHead, create_encoder
from supcon_jax.tools import export as tool
from supcon_jax.weights import read_weights
from tests.runs import RESNET, linear_config, pretrain_config, save_made_up
from tests.test_docs import python_blocks

IMAGES = open_source("digits", "test").images[:5]
# What a user without this package writes, docs/use.md.
ALONE = """
import sys
import jax.export
import numpy as np

with open("model.stablehlo", "rb") as file:
    model = jax.export.deserialize(bytearray(file.read()))
outputs = {}
for name in ("small", "large"):
    for key, value in model.call(np.load(f"{name}.npy")).items():
        outputs[f"{name}_{key}"] = value
np.savez("outputs.npz", **outputs)
assert not any(name.startswith(("supcon_jax", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A linear evaluation with random weights on a pretraining run with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    save_made_up(pretrain_config(**RESNET), folder / "pretrain")
    changes = {"probe.solver": "lbfgs", "total_steps": 0}
    config = linear_config(folder / "pretrain", **RESNET | changes)

    def solution(x, labels, num_classes, **options):
        rng = np.random.default_rng(0)
        kernel = 3 * rng.normal(size=(x.shape[1], num_classes))
        return linear_eval.Solution(kernel, rng.normal(size=num_classes), 1, {}, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_eval, "fit_classifier", solution)
        linear_eval.linear_eval(config, folder / "linear")
    return folder / "linear"


@pytest.fixture(scope="module")
def model(run):
    return supcon_jax.load_model(run)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "digits"
    tool.main([str(run), f"--out={out}"])
    return out


def expected(model, images):
    embeddings = model.embed(images)
    predictions = model.judge(embeddings)
    return {
        "embedding": embeddings,
        "logits": model.logits(embeddings),
        "probabilities": np.array([p.probabilities for p in predictions]),
    }


def test_jax_alone_runs_the_model_on_images_of_any_number_and_size(
    model, exported, tmp_path
):
    large = np.random.default_rng(0).integers(0, 256, (2, 31, 20, 3), np.uint8)
    np.save(tmp_path / "small.npy", IMAGES)
    np.save(tmp_path / "large.npy", large)
    (tmp_path / "model.stablehlo").symlink_to(exported / "model.stablehlo")
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "alone.py"], cwd=tmp_path, env=environment, check=True
    )
    cropped = central_crop(large, image_size=8, resize=8)
    with np.load(tmp_path / "outputs.npz") as found:
        for name, images in (("small", IMAGES), ("large", cropped)):
            for key, values in expected(model, images).items():
                scale = np.abs(values).max()
                np.testing.assert_allclose(
                    found[f"{name}_{key}"] / scale, values / scale, atol=1e-5
                )


def test_weights_have_the_names_of_torchvision(model, exported):
    file = read_weights(exported / "model.safetensors")
    assert file.metadata == {"format": "pt", "convention": "official"}
    stem = model.trained.variables["encoder"]["params"]["conv_stem"]["kernel"]
    np.testing.assert_array_equal(
        file.arrays["conv1.weight"], np.asarray(stem).transpose(3, 2, 0, 1)
    )
    embeddings = np.float64(model.embed(IMAGES))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    logits = embeddings @ file.arrays["fc.weight"].T + file.arrays["fc.bias"]
    np.testing.assert_allclose(logits, model.logits(model.embed(IMAGES)), rtol=1e-4)


def test_the_card_says_what_the_model_is(run, model, exported):
    card = (exported / "README.md").read_text()
    front = card.split("---")[1]
    assert "pipeline_tag: image-classification" in front
    for words in (
        "# digits", "`resnet8`", "| `eval/top1` |", "1,297 images", "`0`, `1`, `2`",
        "model.call(images)", "embeddings of unit length", "(x / 255 - mean) / std",
        "`probe.solver` | `lbfgs`",
    ):  # fmt: skip
        assert words in card, words
    described = json.loads((exported / "config.json").read_text())
    assert described["architecture"] == "resnet8" and described["num_classes"] == 10
    assert described["class_names"] == list(model.class_names)
    assert described["preprocessing"]["central_crop"] == 8
    assert described["pretrained_cfg"]["input_size"] == [3, 8, 8]
    assert described["num_features"] == model.embed(IMAGES).shape[1]
    # No places of files on this machine.
    text = card + json.dumps(described)
    assert str(run.parent) not in text and described["run"]["pretrained"] == "pretrain"


def test_a_pretraining_run_gives_embeddings(run, tmp_path):
    """There is no classifier in its files, and the card says what they are for."""
    pretrained = export.in_float32(supcon_jax.load_model(run.parent / "pretrain"))
    written = [export.write_weights(tmp_path, pretrained)]
    assert written[0].differences.keys() == {"embedding"}
    assert "fc.weight" not in read_weights(tmp_path / "model.safetensors").arrays
    apply = export.forward(pretrained, temperature=1.0, crop=True)
    assert jax.eval_shape(apply, IMAGES).keys() == {"embedding"}
    card = write_card(pretrained, "encoder", written)
    assert "image-feature-extraction" in card and "Embeds images" in card


def test_a_classifier_of_projections_is_left_out_and_said(run, tmp_path, monkeypatch):
    """Its weights are of no use without the projection head, which has no names."""
    of_projections = {"representation": "projection", "probe.solver": "lbfgs"}
    changes = RESNET | of_projections | {"total_steps": 0, "data.samples_per_class": 5}
    monkeypatch.setattr(
        linear_eval,
        "fit_classifier",
        lambda x, labels, num_classes, **options: linear_eval.Solution(
            np.ones((x.shape[1], num_classes)), np.zeros(num_classes), 1, {}, 0
        ),
    )
    config = linear_config(run.parent / "pretrain", **changes)
    linear_eval.linear_eval(config, tmp_path / "projected")
    model = export.in_float32(supcon_jax.load_model(tmp_path / "projected"))
    written = export.write_weights(tmp_path, model)
    assert written.differences.keys() == {"embedding"}
    arrays = read_weights(tmp_path / "model.safetensors").arrays
    assert "fc.weight" not in arrays
    described = describe(model)
    encoder = supcon_jax.load_model(run.parent / "pretrain")
    assert described["num_features"] == encoder.embed(IMAGES).shape[1]
    assert described["num_classes"] == 0 and len(described["class_names"]) == 10
    assert described["classifier_reads"] == "projection"
    card = write_card(model, "digits", [written])
    assert "The encoder alone: the classifier reads projections" in card
    assert "`fc(torch" not in card
    model.config.encoder.name, model.config.encoder.convention = (
        "resnet50",
        "torchvision",
    )
    model.config.encoder.stem, model.config.encoder.width = "imagenet", 1.0
    assert "strict=False" in write_card(model, "digits", [written])


def test_an_encoder_without_batch_norm_is_exported_from_its_projections(run, tmp_path):
    vit = create_encoder("vit_tiny_patch16", image_size=16, width=0.34)
    both = EncoderWithProjection(vit, ProjectionHead((8,), 4))
    model = supcon_jax.load_model(run)
    variables = both.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    assert "encoder" not in variables.get("batch_stats", {})
    model.config.encoder.name, model.config.data.image_size = "vit_tiny_patch16", 16
    model.trained = dataclasses.replace(
        model.trained,
        encoder=both,
        variables={
            "encoder": {"params": variables["params"], "batch_stats": {}},
            "head": model.trained.variables["head"],
        },
    )
    assert export.write_weights(tmp_path, model).differences["embedding"] < 1e-4


def test_examples_of_the_documents(run, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linear_digits").symlink_to(run)
    (tmp_path / "exported").symlink_to(exported)
    library, alone = python_blocks("docs/use.md")
    names = {"images": IMAGES}
    exec(library, names)
    assert names["embeddings"].shape[0] == len(names["predictions"]) == 5
    exec(alone, names)
    np.testing.assert_allclose(
        names["outputs"]["embedding"], names["embeddings"], rtol=1e-4, atol=1e-5
    )


def refused(*arguments, capsys):
    """The line of an export that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        tool.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_differs_is_refused():
    values = {"embedding": np.array([[1.0, -2.0]]), "logits": np.array([[1e-3, 5e-4]])}
    close = {name: x * (1 + 1e-5) for name, x in values.items()}
    written = export.compare("model.onnx", close, values)
    assert written.differences == pytest.approx({"embedding": 1e-5, "logits": 1e-5})
    for wrong in (values["logits"] + 1e-6, values["logits"] * np.nan):
        with pytest.raises(ValueError, match="model.onnx does not give .* its logits"):
            export.compare("model.onnx", close | {"logits": wrong}, values)


@pytest.mark.parametrize(
    "error, says",
    [
        (ValueError("model.stablehlo does not give what the run gives"), "not give"),
        (OSError(28, "No space left on device"), "No space left on device (--out)"),
    ],
)
def test_an_export_that_fails_leaves_nothing(
    run, error, says, tmp_path, monkeypatch, capsys
):
    def fail(folder, model):
        (folder / "model.safetensors").write_bytes(b"whole")
        raise error

    monkeypatch.setattr(tool, "export_files", fail)
    # As if it were raised in the package, whose errors are worded for the user.
    monkeypatch.setattr("supcon_jax.cli._raised_by_us", lambda error: True)
    assert says in refused(run, f"--out={tmp_path / 'out'}", capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(run, tmp_path, capsys):
    unfinished = tmp_path / "run"
    save_made_up(pretrain_config(), unfinished)
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:-1]))
    error = refused(unfinished, f"--out={tmp_path / 'out'}", capsys=capsys)
    assert "is not finished (its newest save is of step 12); the command" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_and_a_bucket_are_refused(run, tmp_path, capsys):
    assert "is there already" in refused(run, f"--out={tmp_path}", capsys=capsys)
    assert "on a local disk" in refused(run, "--out=gs://bucket/out", capsys=capsys)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("resnet18", {"convention": "torchvision"}),
        ("wrn28_2", {}),
        ("vit_tiny_patch16", {}),
    ],
)
def test_every_kind_of_encoder_takes_any_number_of_images(name, changes):
    """Traced alone: nothing in it needs the number of images before it runs."""
    encoder = create_encoder(name, image_size=32, width=0.34).clone(**changes)

    def apply(variables, images):
        return encoder.apply(variables, images, train=False)

    init = functools.partial(encoder.init, train=False)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    (batch,) = jax.export.symbolic_shape("b")
    many = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    shape = jax.eval_shape(apply, variables, images).shape
    exported = jax.export.export(jax.jit(apply))(variables, many)
    assert exported.out_avals[0].shape == (batch, shape[1])


def test_what_a_converter_cannot_do_is_left_out(model, tmp_path, monkeypatch):
    """The other files are exported all the same."""

    def fail(path, model, temperature):
        path.write_bytes(b"half")
        raise TypeError("no such operation\nand more")

    monkeypatch.setattr(export.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(export, "_convert", fail)
    written = export.write_onnx(tmp_path, model, 1.0)
    assert written.left_out == "jax2onnx: no such operation"
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_without_names_elsewhere_is_said(model, tmp_path):
    config = model.config.copy_and_resolve_references()
    config.encoder.name = "mine"
    other = supcon_jax.load_model(model.workdir)
    other.config = config
    written = export.write_weights(tmp_path, other)
    assert "the arrays of mine have no names in PyTorch" in written.left_out
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_of_an_accelerator_becomes_float32(model):
    encoder = model.trained.encoder.clone(dtype=jnp.bfloat16)
    trained = dataclasses.replace(model.trained, encoder=encoder)
    low = supcon_jax.load_model(model.workdir)
    low.trained = trained
    assert export.in_float32(low).trained.encoder.dtype == jnp.float32


@pytest.mark.slow
def test_onnx_gives_the_same(model, tmp_path):
    """jax2onnx takes a minute; it changes JAX in this process."""
    for package in ("jax2onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (docs/use.md)")
    script = (
        "import pathlib, supcon_jax; from supcon_jax.inference import export;"
        f"model = supcon_jax.load_model({model.workdir!r});"
        f"print(export.write_onnx(pathlib.Path({str(tmp_path)!r}), model, 1.5))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    for images in (IMAGES, IMAGES[:1]):
        found = dict(zip(names, session.run(names, {"images": images}), strict=True))
        embeddings = model.embed(images)
        np.testing.assert_allclose(found["embedding"], embeddings, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["logits"], model.logits(embeddings), rtol=1e-4, atol=1e-5
        )
