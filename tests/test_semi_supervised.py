"""Hidden labels and unlabelled images: who sees them, and who leaves them out."""

import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from supcon_jax import pretrain
from supcon_jax.config.check import check_config
from supcon_jax.data.selection import (
    add_label_noise,
    hide_labels,
    take_fraction,
    take_per_class,
)
from supcon_jax.data.sources import ArraySource, FileSource
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.losses import supcon_loss
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.run import splits
from supcon_jax.run.opening import open_run
from supcon_jax.run.splits import count_training, open_sources
from tests.runs import first_batches, pretrain_config

FIVE = {"data.labelled_per_class": 5}
TENTH = {"data.labelled_fraction": 0.1}


def numbered(labels):
    """Image i is filled with i."""
    labels = np.asarray(labels, np.int32)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource(np.tile(images, (1, 2, 2, 3)), labels, 3)


# --- which labels are kept ---


def test_the_labels_kept_are_those_that_the_keys_for_fewer_images_keep():
    source = numbered([0] * 20 + [1] * 10 + [2] * 30 + [-1] * 5)
    few = hide_labels(source, per_class=4, seed=3)
    half = hide_labels(source, fraction=0.5, seed=3)
    assert few.num_examples == half.num_examples == 65
    np.testing.assert_array_equal(few.images, source.images)
    kept = np.flatnonzero(few.labels >= 0)
    np.testing.assert_array_equal(
        source.take_rows(kept).images, take_per_class(source, 4, seed=3).images
    )
    np.testing.assert_array_equal(few.labels[kept], source.labels[kept])
    same = take_fraction(source, 0.5, seed=3)
    kept = np.flatnonzero(half.labels >= 0)
    assert np.bincount(half.labels[kept]).tolist() == [10, 5, 15]
    np.testing.assert_array_equal(
        source.take_rows(kept).images, same.take_rows(same.labels >= 0).images
    )
    other = hide_labels(source, per_class=4, seed=4)
    assert not np.array_equal(other.labels, few.labels)
    assert hide_labels(source, seed=3) is source


def test_a_class_with_too_few_images_and_a_share_that_leaves_none():
    with pytest.raises(
        ValueError, match=r"class 1 has 2.*--config\.data\.labelled_per"
    ):
        hide_labels(numbered([0] * 9 + [1] * 2 + [2] * 9), per_class=3, seed=0)
    with pytest.raises(ValueError, match=r"no label .--config\.data\.labelled_fract"):
        hide_labels(numbered([0, 1, 2]), fraction=0.1, seed=0)


def test_noise_changes_no_hidden_label():
    hidden = hide_labels(numbered([0, 1, 2] * 20), per_class=5, seed=0)
    noisy = add_label_noise(hidden, 1.0, seed=0)
    np.testing.assert_array_equal(noisy.labels < 0, hidden.labels < 0)
    assert not np.array_equal(noisy.labels, hidden.labels)


# --- what a run does with them ---


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 images of each of 2 classes, 4 for evaluation, and 9 beside them."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for place, count in {
        "train/red": 12,
        "train/green": 12,
        "val/red": 4,
        "val/green": 4,
        "unlabelled/more": 8,
        "unlabelled": 1,
    }.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        channel = 0 if "red" in place else 1
        for number in range(count):
            pixels = rng.integers(0, 90, (8, 8, 3), np.uint8)
            pixels[..., channel] += 160
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    (root / "unlabelled" / "list.txt").write_text("")
    return root


def folder_config(folder, **changes):
    return pretrain_config(
        **{"data.name": "folder", "data.root": str(folder)} | changes
    )


@pytest.fixture(scope="module")
def semi(images, tmp_path_factory):
    """A run of SupCon with five labels a class and images beside, and what it said."""
    workdir, lines, banks = tmp_path_factory.mktemp("semi"), [], []
    handler, logger = logging.Handler(), logging.getLogger("supcon_jax")
    handler.emit = lambda record: lines.append(record.getMessage())

    def spy(bank, bank_labels, *queries, **options):
        banks.append(bank_labels)
        return knn_accuracy(bank, bank_labels, *queries, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "knn_accuracy", spy)
        patch.setattr(logger, "level", logging.INFO)
        logger.addHandler(handler)
        final = pretrain.pretrain(folder_config(images, **FIVE), workdir)
    logger.removeHandler(handler)
    return workdir, final, lines, banks


def test_the_start_line_counts_labels_and_the_bank_holds_no_others(semi):
    _, final, lines, banks = semi
    said = "33 training images, 2 classes; without a label: 23 of 33 training images"
    line = next(line for line in lines if said in line)
    assert line.endswith("; with one: 10 training images")
    assert any(line.endswith("unlabelled: left alone 1 .txt") for line in lines)
    assert np.bincount(banks[0]).tolist() == [5, 5]
    assert final["knn/top1"] > 0.8 and np.isfinite(final["train/loss"])


def test_another_choice_of_labels_is_another_run(semi, images):
    workdir, *_ = semi
    for changes in ({"data.labelled_per_class": 6}, TENTH, {"data.split_seed": 1}):
        kept = {} if changes is TENTH else FIVE
        with pytest.raises(ValueError, match=r"differing: data\.(labelled|split_seed)"):
            pretrain.pretrain(folder_config(images, **kept | changes), workdir)


def test_batches_have_minus_one_where_a_label_is_hidden(tmp_path):
    run = open_run(pretrain_config(**FIVE, batch_size=256), tmp_path)
    whole, _ = open_sources(pretrain_config())
    batch = next(first_batches(run))
    labels = run.train_source.labels[batch["id"][:, 1]]
    np.testing.assert_array_equal(batch["label"], labels)
    known = labels >= 0
    assert 0 < known.sum() < 50
    np.testing.assert_array_equal(labels[known], whole.labels[batch["id"][:, 1]][known])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.name": "cross_entropy"},
        {"mode": "linear_eval", "pretrained": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("hidden", [FIVE, TENTH], ids=str)
def test_a_classifier_is_trained_on_the_labelled_images_alone(changes, hidden, caplog):
    caplog.set_level("INFO", "supcon_jax")
    train, _ = open_sources(pretrain_config(**changes, **hidden))
    fewer = {"data.samples_per_class": 5} if hidden is FIVE else {"data.fraction": 0.1}
    same, _ = open_sources(pretrain_config(**changes, **fewer))
    np.testing.assert_array_equal(train.images, same.images)
    np.testing.assert_array_equal(train.labels, same.labels)
    left = 1297 - same.num_examples
    assert f"left out: {left:,} of 1,297 training images" in caplog.text


CLASSIFIER = {"loss.name": "cross_entropy"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.classes": (1, 7)},
        {"data.fraction": 0.5, "data.validation_fraction": 0.2},
        {"data.samples_per_class": 7},
        FIVE,
        FIVE | CLASSIFIER,
        TENTH | CLASSIFIER,
        {"mode": "linear_eval", "data.samples_per_class": 20} | TENTH,
    ],
    ids=str,
)
def test_data_that_are_not_opened_are_counted_as_a_run_chooses_them(changes):
    """Costs of studies and plans for data that are elsewhere."""
    config = pretrain_config(**changes, batch_size=1)
    train, _ = open_sources(config)
    count, classes = count_training(config, 1297, 10)
    assert classes == train.num_classes
    assert count == pytest.approx(train.num_examples, rel=0.03)


def test_a_classifier_beside_the_loss_counts_labelled_images_alone(tmp_path):
    """The loss of two labelled images is the mean of their losses, each alone."""
    config = pretrain_config(**FIVE, **{"loss.cross_entropy_weight": 0.1})
    run = open_run(config, tmp_path)
    state = jax.jit(run.plan.init)()
    batch = next(first_batches(run))
    labels = np.full(16, -1, np.int32)
    step = jax.jit(run.plan.step)

    def loss_of(labels):
        metrics = step(state, batch | {"label": labels})[1]
        return float(metrics["train/cross_entropy_loss"])

    assert loss_of(labels) == 0.0
    one, two = labels.copy(), labels.copy()
    one[3], two[[3, 7]] = 4, (4, 2)
    other = labels.copy()
    other[7] = 2
    losses = [loss_of(x) for x in (one, other, two)]
    np.testing.assert_allclose(losses[2], (losses[0] + losses[1]) / 2, rtol=1e-5)


def test_cross_entropy_over_hidden_labels_is_that_of_the_others():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(12, 2, 5)), jnp.float32)
    labels = jnp.asarray(np.where(np.arange(12) % 3, -1, np.arange(12) % 5))
    known = np.flatnonzero(np.asarray(labels) >= 0)
    got = cross_entropy_of_views(logits, labels)
    want = cross_entropy_of_views(logits[known], labels[known])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1]["top1"], want[1]["top1"], rtol=1e-6)


def test_supcon_has_own_views_alone_for_hidden_labels():
    """Equation 2 as a loop: an unlabelled anchor's positives are its own other views,
    and its views are negatives of all other anchors."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 2, 4))
    labels = np.asarray([0, -1, 0, 1, -1, 1])
    unit = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(12, 4)
    group = np.repeat(np.where(labels < 0, -1 - np.arange(6), labels), 2)
    similarity, total = unit @ unit.T / 0.1, 0.0
    for i in range(12):
        others = [a for a in range(12) if a != i]
        log_sum = np.log(sum(np.exp(similarity[i, a]) for a in others))
        positives = [p for p in others if group[p] == group[i]]
        assert len(positives) == (1 if group[i] < 0 else 3)
        total -= np.mean([similarity[i, p] - log_sum for p in positives])
    found = supcon_loss(jnp.asarray(z, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(float(found), total / 12, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, says",
    [
        (FIVE | TENTH, "labelled_fraction=0.1 and .*allowed: one of them"),
        (FIVE | {"data.classes_per_batch": 4}, "hidden labels; allowed: one of them"),
        ({"data.labelled_fraction": 0.0}, "above 0 and at most 1"),
        ({"data.labelled_per_class": -1}, "at least 0"),
    ],
    ids=str,
)
def test_keys_that_are_refused(changes, says):
    with pytest.raises(ValueError, match=says) as refusal:
        check_config(pretrain_config(**changes))
    assert "\n" not in str(refusal.value) and "--config.data." in str(refusal.value)


def test_batches_of_classes_serve_a_classifier(tmp_path):
    changes = {"loss.name": "cross_entropy", "data.classes_per_batch": 4}
    run = open_run(pretrain_config(**FIVE, **changes), tmp_path)
    batch = next(first_batches(run))
    assert sorted(np.unique(batch["label"], return_counts=True)[1]) == [4] * 4


# --- folders ---


@pytest.fixture
def folder(images, tmp_path):
    """A copy to change."""
    return pathlib.Path(shutil.copytree(images, tmp_path / "images"))


def test_a_folder_of_unlabelled_images_joins_the_training_images(folder):
    train, test = open_sources(folder_config(folder))
    assert train.class_names == ("green", "red") and test.num_unlabelled == 0
    assert (train.num_examples, train.num_unlabelled) == (33, 9)
    assert [str(p) for p in train.paths[-9:]] == sorted(
        str(p) for p in folder.glob("unlabelled/**/*.png")
    )
    classifier = {"loss.name": "cross_entropy"}
    assert open_sources(folder_config(folder, **classifier))[0].num_examples == 24
    (folder / "unlabelled").rename(folder / "Unlabeled")
    assert open_sources(folder_config(folder))[0].num_examples == 33


def test_an_empty_folder_of_unlabelled_images_is_refused(folder):
    for path in folder.glob("unlabelled/**/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"unlabelled holds no images.*data\.root"):
        open_sources(folder_config(folder))


def test_unlabelled_images_without_a_training_folder(folder, messages):
    """A class of that name, with a note; or the folder of the training images lacks."""
    (folder / "train").rename(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="has unlabelled, val and no folder 'train'"):
        open_sources(folder_config(folder))
    (folder / "unlabelled").rename(folder.parent / "elsewhere" / "unlabelled")
    root = folder.parent / "elsewhere"
    held = {"data.validation_fraction": 0.25}
    train, _ = open_sources(folder_config(root, **held))
    assert "unlabelled" in train.class_names
    assert any("taken for a class" in note for note in train.notes)


def test_batches_of_classes_say_that_they_leave_images_out(folder, tmp_path, messages):
    config = folder_config(folder, **{"data.classes_per_batch": 2})
    open_run(config, tmp_path / "run")
    assert any(
        "9 training images without a label are in no batch" in m for m in messages
    )


def test_one_view_leaves_an_unlabelled_image_without_a_positive(messages):
    config = pretrain_config(**FIVE, **{"data.views": 1})
    splits.check_positives(config, open_sources(config)[0])
    assert any("1,247 images without a label have no positive" in m for m in messages)


def test_files_have_their_label_hidden():
    source = FileSource(
        np.asarray([f"{i}.png" for i in range(6)]),
        np.asarray([0, 0, 0, 1, 1, 1], np.int32),
        ("a", "b"),
    )
    hidden = hide_labels(source, per_class=1, seed=0)
    assert hidden.num_unlabelled == 4 and hidden.paths.tolist() == source.paths.tolist()
