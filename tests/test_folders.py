"""Opening folders of images: splits and classes wherever they lie, and refusals."""

import shutil

import numpy as np
import pytest
from PIL import Image

from supcon_jax.data.datasets import open_source
from tests.test_datasets import refusal


def image_folder(path, classes, *, count=3, size=(6, 4)):
    """`classes` folders of JPEGs, each of one colour."""
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", size, (40 * number, 10 * index, 0))
            image.save(path / name / f"{index}.jpg")


def test_folder_with_train_and_val(tmp_path):
    image_folder(tmp_path / "train", ["cat", "ant", "dog"])
    image_folder(tmp_path / "val", ["dog", "ant"], count=2)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.jpg").write_text("not an image")
    (tmp_path / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "train" / "ant" / "more" / "big.JPEG")
    train = open_source("folder", "train", root=str(tmp_path))
    val = open_source("folder", "val", root=str(tmp_path))
    assert train.class_names == val.class_names == ("ant", "cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert val.labels.tolist() == [0, 0, 2, 2]  # numbered as in train
    assert train.num_examples == 10 and train.num_classes == 3
    example = train.read(4)
    assert example.label == 1 and example.orientation == 1
    assert example.image == (tmp_path / "train" / "cat" / "0.jpg").read_bytes()
    assert train.notes == (f"{tmp_path / 'train'}: left alone 1 .txt",)
    assert val.notes == ()
    assert "--config.data.eval_split" in refusal("folder", "odd", root=str(tmp_path))


def test_folder_without_splits(tmp_path):
    image_folder(tmp_path, ["ant", "cat"])
    assert open_source("folder", "train", root=str(tmp_path)).num_examples == 6
    message = refusal("folder", "val", root=str(tmp_path))
    assert "--config.data.validation_fraction" in message


def test_folder_refuses_what_it_cannot_use(tmp_path):
    assert "--config.data.root" in refusal("folder", "train", root="")
    assert "/nowhere" in refusal("folder", "train", root="/nowhere")
    message = refusal("folder", "train", root=str(tmp_path))
    assert "holds no folders" in message and "--config.data.root" in message
    image_folder(tmp_path / "train", ["ant", "cat"])
    image_folder(tmp_path / "val", ["ant", "cow"])
    message = refusal("folder", "val", root=str(tmp_path))
    assert "'cow'" in message and "lacks" in message
    (tmp_path / "train" / "empty").mkdir()
    message = refusal("folder", "train", root=str(tmp_path))
    assert f"{tmp_path / 'train' / 'empty'} holds no images" in message


@pytest.mark.parametrize(
    ("train", "held", "asked"),
    [
        ("train", "val", "test"),
        ("train", "test", "val"),
        ("train", "test", "validation"),
        ("Train", "Test", "test"),
        ("TRAIN", "Valid", "test"),
        ("training", "validation", "val"),
        ("Training", "testing", "test"),
    ],
)
def test_splits_go_by_their_usual_names(tmp_path, messages, train, held, asked):
    image_folder(tmp_path / train, ["ant", "cat"])
    image_folder(tmp_path / held, ["ant", "cat"], count=2)
    assert open_source("folder", "train", root=str(tmp_path)).num_examples == 6
    source = open_source("folder", asked, root=str(tmp_path))
    assert source.num_examples == 4 and held in source.name(0)
    said = f"there is no split {asked!r}: taking {held!r}"
    assert (said in messages) == (asked != held.lower())


def test_a_split_that_is_there_is_not_replaced(tmp_path, messages):
    for count, name in enumerate(("train", "val", "test", "holdout"), start=1):
        image_folder(tmp_path / name, ["ant", "cat"], count=count)
    for count, name in enumerate(("train", "val", "test", "holdout"), start=1):
        source = open_source("folder", name, root=str(tmp_path))
        assert source.num_examples == 2 * count
    assert messages == []


@pytest.mark.parametrize("way", ["flowers", "a/b"])
def test_the_splits_or_classes_may_lie_further_down(tmp_path, messages, way):
    for split in ("train", "val"):
        image_folder(tmp_path / "splits" / way / split, ["ant", "cat"])
    image_folder(tmp_path / "classes" / way, ["ant", "cat"])
    (tmp_path / "classes" / "__MACOSX" / "ant").mkdir(parents=True)
    for root in ("splits", "classes"):
        source = open_source("folder", "train", root=str(tmp_path / root))
        assert source.class_names == ("ant", "cat") and source.num_examples == 6
        below = tmp_path / root / way
        assert any(str(below) in message for message in messages)


def test_a_class_alone_is_no_folder_to_look_into(tmp_path):
    image_folder(tmp_path, ["ant"])
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.class_names == ("ant",)


def test_splits_without_training_images_are_no_classes(tmp_path):
    for split in ("test", "val"):
        image_folder(tmp_path / split, ["ant", "cat"])
    message = refusal("folder", "train", root=str(tmp_path))
    assert "has test, val and no folder 'train'" in message
    image_folder(tmp_path / "train", ["ant", "cat"])
    message = refusal("folder", "test", root=str(tmp_path / "train"))
    assert f"or give {tmp_path} (--config.data.root)" in message


@pytest.mark.parametrize("name", ["test", "Val"])
def test_a_split_beside_classes_is_no_class(tmp_path, name):
    """It was trained on as one more class."""
    image_folder(tmp_path, ["cat", "dog"])
    image_folder(tmp_path / name, ["cat", "dog"])
    for split in ("train", name):
        message = refusal("folder", split, root=str(tmp_path))
        assert (
            f"has {name!r} beside folders of classes and no folder 'train'" in message
        )
        assert "move the classes into 'train' (--config.data.root)" in message
    (tmp_path / "train").mkdir()
    for kind in ("cat", "dog"):
        (tmp_path / kind).rename(tmp_path / "train" / kind)
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir", ".thumbs"])
def test_hidden_folders_and_files_are_no_data(tmp_path, hidden):
    image_folder(tmp_path / "train", ["ant", "cat"])
    picture = tmp_path / "train" / "cat" / "0.jpg"
    for place in ("", "train", "train/ant", "train/ant/deeper"):
        folder = tmp_path / place / hidden
        folder.mkdir(parents=True)
        shutil.copy(picture, folder / "0.jpg")
        for name in ("._0.jpg", "@0.jpg"):
            shutil.copy(picture, tmp_path / place / name)
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.class_names == ("ant", "cat")
    assert source.num_examples == 6 and source.notes == ()


def test_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    image_folder(elsewhere, ["many", "cat"])
    root = tmp_path / "root"
    image_folder(root / "train", ["ant"])
    (root / "train" / "cat").symlink_to(elsewhere / "cat")
    (root / "train" / "ant" / "more").symlink_to(elsewhere / "many")
    (root / "train" / "ant" / "up").symlink_to(root / "train")
    (root / "train" / "ant" / "here").symlink_to(root / "train" / "ant")
    (elsewhere / "many" / "back").symlink_to(root)
    (elsewhere / "many" / "self").symlink_to(elsewhere / "many")
    (root / "train" / "ant" / "link.jpg").symlink_to(elsewhere / "cat" / "0.jpg")
    source = open_source("folder", "train", root=str(root))
    assert np.bincount(source.labels).tolist() == [7, 3]
    assert not any("back" in path or "up" in path for path in source.paths)


def test_what_is_left_alone_is_counted(tmp_path):
    image_folder(tmp_path / "train", ["ant", "cat"])
    for name in ("ant/a.heic", "ant/b.HEIC", "cat/c.heic", "cat/README", "cat/d.txt"):
        (tmp_path / "train" / name).write_text("")
    shutil.copy(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "train" / "stray.jpg")
    (note,) = open_source("folder", "train", root=str(tmp_path)).notes
    assert "left alone 3 .heic, " in note and "1 .txt" in note
    assert "1 without a suffix" in note and "1 images beside the folders" in note
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "e.heic").write_text("")
    message = refusal("folder", "train", root=str(tmp_path))
    assert "dog holds no images" in message and "it has 1 .heic" in message
