"""Images without labels, and labels that are other numbers or words: through whole runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from supcon_jax.data.datasets import open_source
from supcon_jax.data.selection import (
    add_label_noise,
    hold_out,
    take_fraction,
    take_labelled,
    take_per_class,
)
from supcon_jax.data.sources import (
    UNLABELLED,
    UNREAD,
    ArraySource,
    Encoded,
    Source,
    Unreadable,
    has_labels,
    read_labels,
)
from supcon_jax.evaluation.classification import classification_sums, summarize
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.linear_eval import linear_eval
from supcon_jax.pretrain import pretrain
from supcon_jax.run.splits import open_sources
from tests.runs import linear_config, pretrain_config

RNG = np.random.default_rng(0)


def pictures(labels):
    """Noise around a colour for each label; what has none is of any colour."""
    colour = np.where(labels < 0, RNG.integers(0, 3, len(labels)), labels) % 3
    pixels = RNG.integers(0, 90, (len(labels), 8, 8, 3), np.uint8)
    pixels[np.arange(len(labels)), :, :, colour] += 160
    return pixels


def save(path, **labels):
    arrays = {}
    for split, values in labels.items():
        values = np.asarray(values)
        number = np.unique(values, return_inverse=True)[1].reshape(values.shape)
        if values.dtype.kind in "if":
            number = np.where(values < 0, -1, number)
        arrays |= {f"{split}_images": pictures(number.ravel())}
        arrays |= {f"{split}_labels": values}
    np.savez(path, **arrays)
    return {"data.name": "arrays", "data.root": str(path)}


@pytest.fixture
def partly(tmp_path):
    """48 training images of 3 classes, 24 of them without a label; 20 for evaluation."""
    train = np.where(np.arange(48) % 2, np.arange(48) // 2 % 3, -1)
    test = np.where(np.arange(20) < 5, -1, np.arange(20) % 3)
    return save(tmp_path / "partly.npz", train=train, test=test)


@pytest.mark.slow
def test_unlabelled_images_in_every_kind_of_run(partly, tmp_path, caplog):
    caplog.set_level("INFO", "supcon_jax")
    supcon = pretrain(pretrain_config(**partly), tmp_path / "supcon")
    assert supcon["knn/top1"] > 0.8
    said = "48 training images, 3 classes; without a label: 24 of 48 training images"
    assert f"supcon on arrays: {said}, 5 of 20 evaluation images" in caplog.text
    simclr = pretrain_config(**partly, **{"loss.name": "simclr"})
    assert pretrain(simclr, tmp_path / "simclr")["knn/top1"] > 0.8
    probe = pretrain_config(**partly, **{"probe.learning_rate": 0.1})
    assert pretrain(probe, tmp_path / "probe")["eval/num_examples"] == 15
    baseline = pretrain_config(**partly, **{"loss.name": "cross_entropy"})
    final = pretrain(baseline, tmp_path / "baseline")
    assert final["eval/num_examples"] == 15 and np.isfinite(final["train/loss"])
    final = linear_eval(linear_config(tmp_path / "supcon", **partly), tmp_path / "lin")
    assert final["eval/num_examples"] == 15 and np.isfinite(final["train/loss"])


@pytest.mark.slow
def test_simclr_trains_and_is_evaluated_without_any_label(tmp_path, caplog):
    caplog.set_level("INFO", "supcon_jax")
    none = save(tmp_path / "none.npz", train=np.full(32, -1), test=np.full(16, -1))
    none |= {"loss.name": "simclr", "eval_every": 6, "checkpoint_every": 6}
    final = pretrain(pretrain_config(**none), tmp_path / "run")
    assert "knn/top1" not in final and final["embedding/rankme"] > 1
    assert "no kNN: it needs labels" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.name": "cross_entropy"},
        {"probe.learning_rate": 0.1},
        {"loss.cross_entropy_weight": 0.5},
        {"mode": "linear_eval", "pretrained": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_needs_labels_refuses_a_split_without_any(split, changes, tmp_path):
    labels = {"train": np.arange(32) % 3, "test": np.arange(16) % 3}
    labels[split] = np.full(len(labels[split]), -1)
    data = save(tmp_path / "data.npz", **labels)
    run = linear_eval if "mode" in changes else pretrain
    with pytest.raises(
        ValueError, match=rf"split '{split}' of arrays has a label"
    ) as e:
        run(pretrain_config(**data, **changes), tmp_path / "run")
    assert "\n" not in str(e.value) and "--config.data." in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"loss.name": "cross_entropy"}], ids=str)
def test_one_class_alone_is_refused(changes, tmp_path):
    one = save(tmp_path / "one.npz", train=np.zeros(32, int), test=np.arange(16) % 3)
    with pytest.raises(ValueError, match="one class alone.*--config.data.root"):
        open_sources(pretrain_config(**one, **changes))


def test_simclr_on_one_class_is_warned_that_knn_says_nothing(tmp_path, messages):
    one = save(tmp_path / "one.npz", train=np.zeros(32, int), test=np.zeros(16, int))
    open_sources(pretrain_config(**one, **{"loss.name": "simclr"}))
    assert any("kNN says nothing" in message for message in messages)


# --- evaluation ---


def test_metrics_of_the_labelled_examples_alone():
    logits = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    labels, mask = jnp.array([1, -1, 3, 0, -5, 2]), jnp.array([1.0, 1, 1, 1, 1, 0])
    got = classification_sums(logits, labels, mask)
    rows = jnp.array([0, 2, 3])
    want = classification_sums(logits[rows], labels[rows], mask[rows])
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
    assert got["num_examples"] == 3
    nothing = classification_sums(logits, jnp.full(6, -1), mask)
    for sums in ([nothing], []):
        with pytest.raises(ValueError, match="has a label .--config.data.eval_split"):
            summarize(sums)


def test_knn_of_the_labelled_examples_alone():
    """An unlabelled neighbour has no vote, an unlabelled query no right answer."""
    bank, queries = RNG.normal(size=(40, 5)), RNG.normal(size=(12, 5))
    labels, answers = np.arange(40) % 3, np.arange(12) % 3
    labels[::4], answers[:5] = -1, -1
    options = {"k": 5, "num_classes": 3}
    got = knn_accuracy(bank, labels, queries, answers, **options)
    known = labels >= 0
    want = knn_accuracy(bank[known], labels[known], queries[5:], answers[5:], **options)
    assert got == want
    for a, b in ((np.full(40, -1), answers), (labels, np.full(12, -1))):
        with pytest.raises(ValueError, match="labelled images"):
            knn_accuracy(bank, a, queries, b, **options)


# --- sources ---


def source_of(labels, num_classes=3):
    labels = np.asarray(labels, np.int32)
    return ArraySource(pictures(labels), labels, num_classes)


def test_choices_of_examples_keep_unlabelled_ones_apart():
    source = source_of([0, 1, 2, -1] * 10)
    assert source.num_unlabelled == 10 and take_labelled(source).num_examples == 30
    labelled = source_of([0, 1, 2] * 10)
    assert take_labelled(labelled) is labelled
    few = take_per_class(source, 4, seed=0)
    assert np.bincount(few.labels).tolist() == [4, 4, 4]
    half = take_fraction(source, 0.5, seed=0)
    assert np.bincount(half.labels + 1).tolist() == [5, 5, 5, 5]
    noisy = add_label_noise(source, 1.0, seed=0)
    np.testing.assert_array_equal(noisy.labels < 0, source.labels < 0)
    assert not np.array_equal(noisy.labels, source.labels)


def test_no_image_without_a_label_is_held_out():
    """It was: lost to training, and of no use to evaluation."""
    source = source_of([0, 1, 2, -1, -1] * 8)
    train, held = hold_out(source, 0.25, seed=0)
    assert np.bincount(held.labels).tolist() == [2, 2, 2] and train.num_unlabelled == 16
    assert train.num_examples == 34
    # The images with a label are divided as if there were no others.
    _, alone = hold_out(take_labelled(source), 0.25, seed=0)
    np.testing.assert_array_equal(held.images, alone.images)
    # Of a split without any label a share is, for what evaluation says without them.
    train, held = hold_out(source_of([-1] * 8), 0.25, seed=0)
    assert (train.num_examples, held.num_examples) == (6, 2)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_a_held_out_share_leaves_every_class_something(fraction, messages):
    """Ten classes of one image, ten of two, one of many."""
    source = source_of([*range(10), *list(range(10, 20)) * 2, *[20] * 40], 21)
    train, held = hold_out(source, fraction, seed=0)
    assert set(train.labels) == set(range(21))
    assert train.num_examples + held.num_examples == 70
    assert any("each keeps one" in message for message in messages)
    with pytest.raises(ValueError, match="0 to evaluate; a class keeps at least one"):
        hold_out(source_of(range(20), 20), fraction, seed=0)


@dataclasses.dataclass(frozen=True)
class Records(Source):
    """A source whose labels only `read` knows."""

    images = None
    own: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)

    def read(self, index):
        if self.own[index] == 99:
            raise OSError("broken")
        return Encoded(b"", int(self.own[index]))


def records(own, **changes):
    own = np.asarray(own)
    return Records(own, np.full(len(own), UNREAD, np.int32), 3, **changes)


def test_labels_that_only_the_records_know():
    source = records([2, -1, 0, -9])
    assert source.num_unlabelled is None
    known = read_labels(source)
    assert known.labels.tolist() == [2, UNLABELLED, 0, UNLABELLED]
    assert known.num_unlabelled == 2 and has_labels(source)
    assert not has_labels(records([-1, -1, 99])) and has_labels(records([-1, 99, 1]))
    with pytest.raises(ValueError, match="label 3 of image 1 is out of range"):
        read_labels(records([0, 3]))
    with pytest.raises(ValueError, match=str(2**40)):
        read_labels(records([0, 2**40]))
    with pytest.raises(ValueError, match="cannot decode image 1: broken"):
        read_labels(records([0, 99]))
    lenient = records([0, 99], unreadable=Unreadable(skip=True))
    assert read_labels(lenient).labels.tolist() == [0, UNLABELLED]


@pytest.mark.parametrize("labels", [[0, 3], [0, 2**40], [0.5, 1.0]], ids=str)
def test_a_source_of_ones_own_is_held_to_its_classes(labels, monkeypatch):
    """Nothing is narrowed to 32 bits without a look."""
    from supcon_jax.data import datasets

    images = np.zeros((2, 8, 8, 3), np.uint8)
    monkeypatch.setitem(
        datasets.SOURCES, "own", lambda *_: ArraySource(images, np.asarray(labels), 3)
    )
    with pytest.raises(ValueError, match="label.*allowed"):
        open_source("own", "train")


# --- folders, as README gives them to the digits' config ---


@pytest.mark.slow
def test_a_folder_with_train_and_val_needs_its_root_alone(tmp_path, messages):
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("red", "green")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number, pixels in enumerate(pictures(np.full(count, label))):
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "images" / "train" / "red" / "raw.heic").write_text("")
    data = {"data.name": "folder", "data.root": str(tmp_path / "images")}
    final = pretrain(pretrain_config(**data), tmp_path / "run")
    assert final["knn/top1"] > 0.8
    assert "there is no split 'test': taking 'val'" in messages
    assert any(message.endswith("train: left alone 1 .heic") for message in messages)
