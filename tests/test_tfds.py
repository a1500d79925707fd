"""TFDS data sets of other kinds than CIFAR: small ones, prepared here."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from supcon_jax import storage
from supcon_jax.data.corrupted import find_splits
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import eval_batches, load_small
from supcon_jax.data.sources import UNLABELLED, UNREAD, read_labels
from supcon_jax.pretrain import pretrain
from supcon_jax.run.batches import build_sampler, build_train_batches
from supcon_jax.run.splits import open_sources
from tests.runs import pretrain_config

kinds = tfds.features
SQUARE = kinds.Image(shape=(8, 8, 3))
ANY_SIZE = kinds.Image(shape=(None, None, 3))
RNG = np.random.default_rng(0)


def rows(labels, key="label"):
    """Images of one colour a label; what has none is of any colour."""
    examples = []
    for number, label in enumerate(labels):
        pixels = RNG.integers(0, 90, (8, 8, 3), np.uint8)
        colour = label if isinstance(label, int) and label >= 0 else number
        pixels[..., colour % 3] += 160
        examples.append({"image": pixels, key: label})
    return examples


def prepare(directory, name, features, splits, config=""):
    """A data set below a TFDS directory, as TFDS itself prepares one."""
    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "name": name,
        "pkg_dir_path": None,
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=kinds.FeaturesDict(features)
        ),
        "_split_generators": lambda self, _: {
            key: self._generate_examples(value) for key, value in splits.items()
        },
        "_generate_examples": lambda self, examples: iter(list(enumerate(examples))),
    }
    if config:
        version = tfds.core.Version("1.0.0")
        body["BUILDER_CONFIGS"] = [
            tfds.core.BuilderConfig(name=config, version=version)
        ]
    with registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    builder(
        data_dir=str(directory),
        file_format="tfrecord",
        **({"config": config} if config else {}),
    ).download_and_prepare()


def label(count=3):
    return kinds.ClassLabel(num_classes=count)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    full = {"train": rows([0, 1, 2] * 12), "test": rows([0, 1, 2] * 5)}
    partly = {"train": rows([0, 1, 2, -1, -1] * 8), "test": rows([0, -1, 1, 2] * 5)}
    nothing = {"unlabelled": rows([-1] * 32), "nothing": rows([-1] * 16)}
    prepare(path, "small", {"image": SQUARE, "label": label()}, partly | nothing)
    prepare(path, "large", {"image": ANY_SIZE, "label": label()}, partly | nothing)
    prepare(path, "plain", {"image": SQUARE, "label": label()}, full)
    pair = {key: [{**r, "label": [2, 1]} for r in part] for key, part in full.items()}
    several = kinds.Sequence(label())
    prepare(path, "several", {"image": SQUARE, "label": several}, pair)
    vector = kinds.Tensor(shape=(2,), dtype=np.int64)
    prepare(path, "vector", {"image": SQUARE, "label": vector}, pair)
    number = kinds.Scalar(np.int64)
    gaps = {"train": rows([7, 10**12, 7]), "test": rows([2**40, -3, 7])}
    prepare(path, "integers", {"image": SQUARE, "label": number}, gaps)
    unsigned = {"image": SQUARE, "label": kinds.Scalar(np.uint64)}
    prepare(path, "unsigned", unsigned, {"train": rows([2**63 - 1, 2**63 + 5])})
    words = {"train": rows(["dog", "ant", ""]), "test": rows(["cat", "dog", "dog"])}
    prepare(path, "words", {"image": SQUARE, "label": kinds.Text()}, words)
    share = {"train": [{**r, "label": 0.5} for r in full["train"]]}
    floats = {"image": SQUARE, "label": kinds.Scalar(np.float32)}
    prepare(path, "floats", floats, share)
    deep = [{**r, "image": np.zeros((8, 8, 1), np.uint16)} for r in full["train"]]
    sixteen = kinds.Image(shape=(8, 8, 1), dtype=np.uint16)
    prepare(path, "deep", {"image": sixteen, "label": label()}, {"train": deep})
    mask = kinds.LabeledImage(labels=3, shape=(8, 8, 1))
    masks = [{**r, "image": np.zeros((8, 8, 1), np.uint8)} for r in full["train"]]
    prepare(path, "masks", {"image": mask, "label": label()}, {"train": masks})
    fine = [{"picture": r["image"], "id": {"fine": r["label"]}} for r in full["train"]]
    prepare(
        path,
        "named",
        {"picture": SQUARE, "id": {"fine": label()}},
        {"train": fine, "test": fine[:9]},
    )
    for config, count in (("aaa-small", 3), ("matched-frequency.v2", 7)):
        features = {"image": SQUARE, "label": label(count)}
        prepare(path, "configs", features, full, config=config)
    prepare(
        path, "single", {"image": SQUARE, "label": label()}, full, config="only-one"
    )
    return str(path)


def refusal(name, split="train", **options):
    with pytest.raises(ValueError) as error:
        open_source(name, split, **options)
    assert "\n" not in str(error.value) and "--config.data." in str(error.value)
    return str(error.value)


def own_labels(directory, name, split):
    """What TFDS reads, in its order."""
    builder = tfds.builder_from_directory(f"{directory}/{name}/1.0.0")
    examples = tfds.as_numpy(builder.as_dataset(split=split))
    return [example["label"] for example in examples]


def config(directory, name, **changes):
    data = {"data.name": name, "data.dir": directory}
    return pretrain_config(**data, **changes)


# --- images without labels ---


@pytest.mark.parametrize("name", ["small", "large"])
def test_images_without_a_label_are_seen(name, directory):
    """They were black, or the split empty: -1 was the mark of padding."""
    source = load_small(open_source(name, "unlabelled", dir=directory), 8)
    assert (source.images is None) == (name == "large")
    for batch in eval_batches(source, batch_size=16, image_size=8, resize=8):
        assert batch["mask"].all() and (batch["label"] == UNLABELLED).all()
        assert (batch["image"].reshape(16, -1).std(axis=1) > 20).all()
    labels = read_labels(open_source(name, "train", dir=directory)).labels
    assert labels.tolist() == own_labels(directory, name, "train")
    assert sum(labels == UNLABELLED) == 16


@pytest.mark.parametrize(
    "name", ["small", pytest.param("large", marks=pytest.mark.slow)]
)
def test_runs_on_images_without_labels(name, directory, tmp_path, messages):
    final = pretrain(config(directory, name), tmp_path / "supcon")
    assert final["knn/top1"] > 0.8
    said = "without a label: 16 of 40 training images, 5 of 20 evaluation images"
    assert any(said in message for message in messages)
    simclr = {"loss.name": "simclr", "data.train_split": "unlabelled"}
    final = pretrain(config(directory, name, **simclr), tmp_path / "simclr")
    assert "knn/top1" not in final and "embedding/rankme" in final
    baseline = {"loss.name": "cross_entropy", "data.eval_split": "nothing"}
    with pytest.raises(ValueError, match="split 'nothing' .* has a label"):
        open_sources(config(directory, name, **baseline))


@pytest.mark.slow
def test_labels_of_a_large_split_stay_unread(directory, monkeypatch, tmp_path):
    """Nobody waits for 150 GB; then the line at the start does not count them."""
    monkeypatch.setattr("supcon_jax.data.sources.READ_AT_START_BYTES", 100)
    train, _ = open_sources(config(directory, "large"))
    assert set(train.labels) == {UNREAD} and train.num_unlabelled is None
    assert pretrain(config(directory, "large"), tmp_path / "a")["knn/top1"] > 0.8
    probe = {"probe.learning_rate": 0.1, "data.eval_split": "nothing"}
    with pytest.raises(ValueError, match="split 'nothing' .* has a label"):
        open_sources(config(directory, "large", **probe))
    no_labels = {"data.train_split": "unlabelled", "data.eval_split": "nothing"}
    final = pretrain(config(directory, "large", **no_labels), tmp_path / "b")
    assert "knn/top1" not in final


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("unread", [False, True])
def test_hidden_labels_stay_hidden(name, unread, directory, monkeypatch):
    """Whatever the records say, which may have been read or not."""
    if unread:
        monkeypatch.setattr("supcon_jax.data.sources.READ_AT_START_BYTES", 100)
    own = np.asarray(own_labels(directory, name, "train"))
    lazily = unread and name == "large"
    for changes in ({"data.labelled_fraction": 0.5}, {"data.labelled_per_class": 3}):
        settings = config(directory, name, **changes)
        train, _ = open_sources(settings)
        assert train.num_examples == len(own)
        shown = train.labels != UNLABELLED
        known = shown & (own >= 0)
        if "data.labelled_per_class" in changes:
            assert np.bincount(own[known]).tolist() == [3, 3, 3] and np.all(
                own[shown] >= 0
            )
        else:
            assert 0 < known.sum() < np.sum(own >= 0)
            assert (train.num_unlabelled is None) == lazily
        sampler = build_sampler(settings, train)
        batch = next(build_train_batches(settings, train, sampler))
        index = batch["id"][:, 1]
        expected = np.where(shown, own, UNLABELLED)[index]
        np.testing.assert_array_equal(batch["label"], expected)
        assert {-1} < {*batch["label"].tolist()}
    # Of a classifier's images those that are known to have none are not even read.
    baseline = {"loss.name": "cross_entropy", "batch_size": 8}
    settings = config(directory, name, **baseline, **changes)
    assert open_sources(settings)[0].num_examples == 9


def test_a_held_out_share_of_records_leaves_every_class_something(directory):
    both = {"data.train_split": "test", "data.validation_fraction": 0.9}
    for seed in range(5):
        changes = both | {"data.split_seed": seed, "batch_size": 1}
        train, held = open_sources(config(directory, "large", **changes))
        assert {0, 1, 2} <= set(read_labels(train).labels)
        assert train.num_examples + held.num_examples == 20


def pixels(source):
    """The images of a split, in memory or encoded."""
    if source.images is not None:
        return source.images
    encoded = (source.read(index).image for index in range(source.num_examples))
    return np.stack(
        [tf.io.decode_image(image, channels=3).numpy() for image in encoded]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"data.validation_fraction": 0.25},
        {"data.fraction": 0.5, "batch_size": 8},
        {"data.labelled_fraction": 0.5},
    ],
    ids=str,
)
def test_what_is_drawn_does_not_depend_on_the_size_of_images(changes, directory):
    """A probe at twice the size was evaluated on images that pretraining had seen."""
    native = open_sources(config(directory, "small", **changes))
    scaled = {"data.image_size": 16, "data.eval_resize": 16}
    other = open_sources(config(directory, "small", **changes, **scaled))
    for one, two in zip(native, other, strict=True):
        assert one.images is not None and two.images is None
        np.testing.assert_array_equal(one.labels, two.labels)
        np.testing.assert_array_equal(pixels(one), pixels(two))
    for source in (native, other):  # of every class alike
        drawn = source[1] if "data.validation_fraction" in changes else source[0]
        counts = np.bincount(drawn.labels[drawn.labels >= 0])
        assert len(counts) == 3 and np.ptp(counts) <= 1


def test_a_share_of_a_large_split_is_drawn_from_all(directory, monkeypatch):
    """Its labels are not read at the start, whatever the size of its images."""
    monkeypatch.setattr("supcon_jax.data.sources.READ_AT_START_BYTES", 100)
    changes = {"data.validation_fraction": 0.25, "batch_size": 8}
    shares = [
        open_sources(config(directory, name, **changes)) for name in ("small", "large")
    ]
    assert shares[0][0].images is not None and set(shares[1][0].labels) == {UNREAD}
    for small, large in zip(*shares, strict=True):
        np.testing.assert_array_equal(small.labels, read_labels(large).labels)


def test_grey_images_of_one_size_are_kept_in_memory(tmp_path):
    """MNIST was decoded in every epoch."""
    grey = [{**r, "image": r["image"][..., :1]} for r in rows([0, 1, 2] * 4)]
    feature = kinds.Image(shape=(8, 8, 1))
    prepare(tmp_path, "grey", {"image": feature, "label": label()}, {"train": grey})
    encoded = open_source("grey", "train", dir=str(tmp_path))
    loaded = load_small(encoded, 8)
    np.testing.assert_array_equal(loaded.images, pixels(encoded))
    np.testing.assert_array_equal(loaded.labels, read_labels(encoded).labels)
    assert load_small(encoded, 16) is encoded


# --- types and names of features ---


def test_ids_without_a_number_of_classes_are_numbered(directory):
    """Over all splits, so that train and test agree."""
    train = open_source("integers", "train", dir=directory)
    test = open_source("integers", "test", dir=directory)
    assert train.class_names == test.class_names == ("7", str(10**12), str(2**40))
    number = {7: 0, 10**12: 1, 2**40: 2, -3: UNLABELLED}
    for split in ("train", "test", "test[1:]+train[:2]"):
        source = open_source("integers", split, dir=directory)
        expected = [number[id] for id in own_labels(directory, "integers", split)]
        assert source.labels.tolist() == expected
        assert [source.read(i).label for i in range(len(expected))] == expected


def test_words_are_numbered(directory):
    train = open_source("words", "train", dir=directory)
    test = open_source("words", "test", dir=directory)
    assert train.class_names == test.class_names == ("ant", "cat", "dog")
    number = {b"ant": 0, b"cat": 1, b"dog": 2, b"": UNLABELLED}
    for split, source in (("train", train), ("test", test)):
        expected = [number[word] for word in own_labels(directory, "words", split)]
        assert source.labels.tolist() == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("several", ("label: Sequence of ClassLabel", "data.label_key='label'")),
        ("vector", ("label: Tensor int64 [2]", "one class an image")),
        ("floats", ("label: Scalar float32 []", "one class an image")),
        ("deep", ("image: Image uint16 [8, 8, 1]", "an Image of uint8")),
        ("masks", ("image: LabeledImage uint8", "an Image of uint8")),
        ("unsigned", (f"is {2**63 + 5}", "up to", "data.label_key")),
        ("named", ("picture: Image uint8 [8, 8, 3]", "data.image_key='image'")),
    ],
)
def test_other_types_are_refused_by_name(directory, name, parts):
    message = refusal(name, dir=directory)
    for part in parts:
        assert part in message


def test_features_go_by_the_names_given(directory):
    keys = {"data.image_key": "picture", "data.label_key": "id/fine"}
    train, test = open_sources(config(directory, "named", **keys))
    assert train.num_examples == 36 and set(train.labels) == {0, 1, 2}
    assert train.images.shape == (36, 8, 8, 3) and train.images.std() > 20
    none = keys | {"data.label_key": "", "loss.name": "simclr"}
    train, _ = open_sources(config(directory, "named", **none))
    assert train.num_unlabelled == 36
    for key in ("nothing", "id", "picture", "id/coarse"):
        options = {"image_key": "picture", "label_key": key, "dir": directory}
        assert f"data.label_key={key!r}" in refusal("named", **options)


# --- configs and splits ---


def test_configs_are_chosen_by_name(directory):
    for name, classes in (("aaa-small", 3), ("matched-frequency.v2", 7)):
        for version in ("", ":1.0.0"):
            full = f"configs/{name}{version}"
            assert open_source(full, "train", dir=directory).num_classes == classes
    message = refusal("configs", dir=directory)
    assert "configs/aaa-small, configs/matched-frequency.v2, and none was" in message
    assert "not configs/other" in refusal("configs/other", dir=directory)
    assert "not 2.0.0" in refusal("configs/aaa-small:2.0.0", dir=directory)
    assert "it holds configs, deep" in refusal("unknown", dir=directory)


def test_the_only_config_is_taken_and_named(directory, messages):
    assert open_source("single", "train", dir=directory).num_examples == 36
    assert any("taking single/only-one" in message for message in messages)
    assert open_source("single/only-one", "test", dir=directory).num_examples == 15


def test_a_download_needs_the_name_of_a_config(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    message = refusal("cifar10_corrupted")
    assert "cifar10_corrupted has the configs brightness_1, " in message
    assert "--config.data.name=cifar10_corrupted/brightness_1" in message


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ("train+test", 51),
        ("train[:10]+test[5:]", 20),
        ("train[:50%]", 18),
        ("train[-6:]", 6),
        ("all", 51),
        ("test + train", 51),
    ],
)
def test_split_expressions(directory, split, count):
    assert open_source("plain", split, dir=directory).num_examples == count


@pytest.mark.parametrize("split", ["train+nope", "train+", "train[:5", "+test"])
def test_split_expressions_that_are_none(directory, split):
    assert "split" in refusal("plain", split, dir=directory)


def test_the_order_of_a_sum_of_splits_is_that_of_tfds(directory):
    split = "test[2:4]+train[:2]"
    source = open_source("plain", split, dir=directory)
    ours = [source.read(i).label for i in range(4)]
    assert ours == own_labels(directory, "plain", split)


# --- lanes ---


def test_lanes_read_blocks_of_the_same_images(directory, tmp_path, monkeypatch):
    """Another order, the same images; what is kept in memory is not read again."""
    requests = []

    def counted(path, ranges, plain=storage.read_ranges):
        requests.append(path)
        return plain(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)

    def batches(count, start=0, **changes):
        train, _ = open_sources(config(directory, "large", **changes))
        changed = config(directory, "large", **changes)
        sampler = build_sampler(changed, train)
        requests.clear()
        stream = build_train_batches(changed, train, sampler, start_step=start)
        found = list(itertools.islice(stream, count))
        stream.close()
        return found

    def images(found):
        """Image of every (epoch, index), each of them once."""
        seen = {}
        for batch in found:
            rows = zip(
                batch["id"].tolist(), batch["image"], batch["label"], strict=True
            )
            for identity, image, label in rows:
                assert tuple(identity) not in seen
                seen[tuple(identity)] = (image.tobytes(), int(label))
        return seen

    lanes = {"data.lanes": 4}
    single, laned = batches(20), batches(20, **lanes)
    kept = len(requests)
    assert not np.array_equal(single[0]["id"], laned[0]["id"])
    one, other = images(single), images(laned)
    common = one.keys() & other.keys()
    assert len(common) > 300 and all(one[key] == other[key] for key in common)
    again = batches(5, start=15, **lanes)
    for late, early in zip(again, laned[15:], strict=True):
        np.testing.assert_equal(late, early)
    assert images(batches(20, **lanes, **{"data.keep_gib": 0.0})) == other
    # Four blocks of ten examples: read once, or once an epoch of two and a half steps.
    assert kept == 4 and len(requests) > 4 * 4
    final = pretrain(config(directory, "large", **lanes), tmp_path)
    assert final["knn/top1"] > 0.8


def test_lanes_need_records_in_files(directory):
    """Images of one size are decoded once and kept."""
    train, _ = open_sources(config(directory, "small"))
    with pytest.raises(ValueError, match="small is held in memory; allowed: TFDS"):
        build_sampler(config(directory, "small", **{"data.lanes": 4}), train)


# --- corrupted versions ---


def test_configs_that_are_corruptions_are_found_by_our_names(tmp_path):
    """As cifar10_corrupted has them, with two names of its own and some beside the 15."""
    for number, name in enumerate(
        ("fog_3", "frosted_glass_blur_1", "elastic_2", "spatter_1")
    ):
        features = {"image": SQUARE, "label": label()}
        split = {"test": rows([number % 3] * 4)}
        prepare(tmp_path, "toy_corrupted", features, split, config=name)
    for place in ("toy_corrupted", "toy_corrupted:1.0.0"):
        places, others = find_splits(place, dir=str(tmp_path), split="test")
        assert list(places) == ["glass_blur_1", "fog_3", "elastic_transform_2"]
        assert others == ("spatter_1",)
        labels = [read_labels(open_source(**at)).labels[0] for at in places.values()]
        assert labels == [1, 0, 2]
    prepare(tmp_path, "plain", {"image": SQUARE, "label": label()}, split, config="a")
    with pytest.raises(ValueError, match="plain has the configs a, none of which"):
        find_splits("plain", dir=str(tmp_path), split="test")
    # Of one that is not prepared, TFDS knows the names.
    places, _ = find_splits("cifar10_corrupted", dir=str(tmp_path), split="test")
    assert len(places) == 75
    assert places["glass_blur_5"]["name"] == "cifar10_corrupted/frosted_glass_blur_5"
