"""Features are kept, and are never those of another encoder or of other images."""

import dataclasses

import jax
import numpy as np
import pytest

from supcon_jax import builders, parallel
from supcon_jax.pretrained import features
from supcon_jax.run.plan import create_plan, init_encoder
from supcon_jax.run.splits import open_sources
from tests.runs import probe_config

FEW = {"data.samples_per_class": 5}


@pytest.fixture(scope="module")
def variables():
    """Of an encoder that nobody has trained."""
    mesh = parallel.create_mesh()
    plan = create_plan(probe_config("random"), mesh, num_classes=10, num_examples=50)
    init = jax.jit(lambda: init_encoder(plan), out_shardings=parallel.replicated(mesh))
    return init()


def parts(variables, **changes):
    """What `features.extract` takes, of the training split."""
    config = probe_config("random", **changes)
    encoder = builders.build_encoder(config, "cpu")
    source = open_sources(config)[0]
    return config, parallel.create_mesh(), encoder, variables, source


def extract(arguments, *folders):
    return features.extract(
        *arguments, name="train", folders=[str(folder) for folder in folders]
    )


def no_encoder(*arguments):
    raise AssertionError("the encoder runs")


def test_features_are_embeddings_and_are_kept(variables, tmp_path, monkeypatch):
    arguments = parts(variables, **FEW)
    config, mesh, encoder, _, source = arguments
    images = (source.images / 255.0 - 0.5) / 0.5
    expected = encoder.apply(variables, images.astype(np.float32), train=False)
    found = extract(arguments, tmp_path / "features")
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, source.labels)
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    again = extract(arguments, tmp_path / "features")
    for kept, new in zip(again, found, strict=True):
        np.testing.assert_array_equal(kept, new)


def test_images_without_label_are_kept_and_can_be_left_out(variables, tmp_path):
    *arguments, source = parts(variables, **FEW)
    labels = np.where(np.arange(50) % 4 == 0, -1, source.labels).astype(np.int32)
    source = dataclasses.replace(source, labels=labels)
    found = extract((*arguments, source), tmp_path)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(
        found.labelled().values, found.values[np.arange(50) % 4 != 0]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"data.fraction": 0.9},
        {"data.samples_per_class": 5},
        {"data.samples_per_class": 5, "data.split_seed": 1},
        {"data.label_noise": 0.1},
        {"data.mean": (0.4, 0.5, 0.5)},
        {"data.eval_resize": 9},
    ],
    ids=str,
)
def test_other_images_or_preparations_are_other_features(change):
    described = [
        features.describe(config, encoder, {}, source)
        for config, _, encoder, _, source in (parts({}), parts({}, **change))
    ]
    names = {features._file_name("train", facts) for facts in described}
    assert len(names) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_features_are_extracted_anew(variables, damage, tmp_path, messages):
    arguments = parts(variables, **FEW)
    before = extract(arguments, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    content = bytearray(whole)
    content[content.index(before.values.tobytes()) + 100] ^= 1
    path.write_bytes({"cut": whole[:-100], "empty": b""}.get(damage, bytes(content)))
    after = extract(arguments, tmp_path)
    assert any(
        "cannot be read" in line and "extracting them anew" in line for line in messages
    )
    np.testing.assert_array_equal(after.values, before.values)
    assert path.read_bytes() == whole


def test_features_of_another_checkpoint_are_extracted_anew(
    variables, tmp_path, messages
):
    config, mesh, encoder, _, source = arguments = parts(variables, **FEW)
    before = extract(arguments, tmp_path)
    later = jax.tree.map(lambda x: 1.1 * x, variables)
    after = extract((config, mesh, encoder, later, source), tmp_path)
    assert any("are of another checkpoint; extracting" in line for line in messages)
    assert not np.array_equal(after.values, before.values)
    assert len(list(tmp_path.iterdir())) == 1  # they took the place of the others


def test_a_file_that_was_given_another_name_is_not_believed(
    variables, tmp_path, messages
):
    extract(parts(variables, **FEW), tmp_path)
    (path,) = tmp_path.iterdir()
    other = parts(variables, **FEW, **{"data.split_seed": 1})
    facts = features.describe(*[other[i] for i in (0, 2, 3, 4)])
    path.rename(tmp_path / features._file_name("train", facts))
    found = extract(other, tmp_path)
    assert any("have another data, data.split_seed" in line for line in messages)
    np.testing.assert_array_equal(found.labels, other[-1].labels)


def test_features_lie_elsewhere_where_the_run_cannot_be_written_to(
    variables, tmp_path, monkeypatch, messages
):
    (tmp_path / "closed").write_text("no folder")
    arguments = parts(variables, **FEW)
    folders = tmp_path / "closed/features", tmp_path / "own/features"
    found = extract(arguments, *folders)
    assert any("are not kept in" in line for line in messages)
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    np.testing.assert_array_equal(extract(arguments, *folders).values, found.values)


def test_features_in_a_bucket(variables, bucket, monkeypatch):
    arguments = parts(variables, **FEW)
    found = extract(arguments, f"{bucket}/features")
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    again = extract(arguments, f"{bucket}/features")
    np.testing.assert_array_equal(again.values, found.values)
