"""What a config leaves to a folder: chosen by its rules, said, and kept."""

import numpy as np
import pytest
from PIL import Image

from configs import common, evaluate_folder, linear_folder, supcon_folder
from supcon_jax import evaluate, linear_eval, parallel, pretrain
from supcon_jax.config.check import check_config, open_keys
from supcon_jax.run import defaults, memory, splits
from supcon_jax.run import opening as run
from supcon_jax.run.defaults import resolve
from supcon_jax.run.report import log_data
from supcon_jax.run.workdir import read_config
from supcon_jax.tools.show_batch import draw

FITS = defaults._fits
CLASSES = {"ant": 20, "bee": 10, "cat": 10}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Nothing is compiled to see whether it fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "_fits", lambda *arguments: True)
        yield


def write_photos(folder, counts=CLASSES, side=40):
    """Noise about a grey level of the class."""
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for photo in range(count):
            pixels = rng.integers(0, 60, (side, side + 10, 3)) + 90 * number
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{photo}.jpg"
            )
    return folder


def folder_config(root, module=supcon_folder, **overrides):
    """A folder config with an encoder that compiles at once."""
    config = module.get_config()
    config.data.root = str(root)
    config.encoder.name, config.encoder.dtype = "one_layer", "float32"
    common.set_augmentation(config, "identity")
    config.compilation_cache = False
    config.update_from_flattened_dict(overrides)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """The path of a new user: pretraining, the classifier, its evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.pretrain(folder_config(photos, total_steps=3), folder / "supcon")
    for module, mode, ours, theirs in (
        (linear_folder, linear_eval.linear_eval, "linear", "supcon"),
        (evaluate_folder, evaluate.evaluate, "evaluate", "linear"),
    ):
        mode(
            folder_config(photos, module, pretrained=str(folder / theirs)),
            folder / ours,
        )
    return folder


def test_all_is_chosen_by_the_rules(photos, caplog):
    config = resolve(folder_config(photos))
    assert open_keys(config) == []
    assert config.data.validation_fraction == 0.2
    assert config.data.eval_split == "train"  # a share of it
    assert config.data.image_size == config.data.eval_resize == 64  # of 40: enlarged
    assert config.batch_size == 16  # 32 training images: half of them
    assert config.epochs == 200
    for key in ("validation_fraction", "image_size", "eval_resize", "batch", "epochs"):
        assert any(
            r.getMessage().startswith("chosen: ") and key in r.getMessage()
            for r in caplog.records
        ), key
    train, held = splits.open_sources(config)
    assert np.bincount(train.labels).tolist() == [16, 8, 8]
    assert np.bincount(held.labels).tolist() == [4, 2, 2]


@pytest.mark.parametrize(
    "platform, side, size, resize",
    [
        ("cpu", 500, 64, 73),
        ("gpu", 500, 224, 256),
        ("gpu", 240, 224, 224),
        ("gpu", 130, 128, 128),
        ("gpu", 150, 128, 146),
        ("tpu", 20, 64, 64),
    ],
)
def test_image_sizes(platform, side, size, resize, photos, monkeypatch):
    monkeypatch.setattr(defaults, "_short_side", lambda train: side)
    config = folder_config(photos)
    defaults._choose_image_size(config, None, platform)
    assert (config.data.image_size, config.data.eval_resize) == (size, resize)


@pytest.mark.parametrize("images, epochs", [(100, 200), (1000, 100), (10**6, 50)])
def test_epochs(images, epochs, photos):
    class Train:
        num_examples = images

    config = folder_config(photos)
    defaults._choose_epochs(config, Train)
    assert config.epochs == epochs


def test_what_is_given_stays(photos):
    given = {
        "batch_size": 24,
        "epochs": 3.0,
        "data.image_size": 32,
        "data.eval_resize": 48,
        "data.validation_fraction": 0.5,
    }
    config = resolve(folder_config(photos, **given))
    assert {key: config.to_dict()[key] for key in ("batch_size", "epochs")} == {
        "batch_size": 24,
        "epochs": 3.0,
    }
    assert config.data.image_size == 32 and config.data.eval_resize == 48
    assert config.data.validation_fraction == 0.5
    without = folder_config(photos, **given, **{"data.eval_split": "train"})
    assert resolve(without) is without  # nothing is opened


@pytest.mark.parametrize(
    "splits, expected",
    [
        (("train", "val", "test"), "val"),
        (("Training", "Testing"), "Testing"),
        (("train",), None),
    ],
)
def test_a_split_that_is_there_is_taken(splits, expected, tmp_path):
    for split in splits:
        write_photos(tmp_path / split, {"ant": 4, "bee": 4})
    config = resolve(folder_config(tmp_path))
    assert config.data.eval_split == (expected or "train")
    assert config.data.validation_fraction == (0.0 if expected else 0.2)


def test_the_batch_is_halved_until_it_fits(photos, monkeypatch):
    monkeypatch.setattr(defaults, "_fits", FITS)
    device_memory = 6 * 2**20
    monkeypatch.setattr(memory, "device_memory", lambda device: device_memory)
    monkeypatch.setattr(
        memory,
        "step_memory",
        lambda compiled: memory.StepMemory(compiled.batch * 2**19, 0),
    )

    class Plan:
        def __init__(self, config):
            self.batch = config.batch_size

        lower = compile = lambda self: self

    monkeypatch.setattr(defaults, "plan_for", lambda config, *_, **__: Plan(config))
    assert resolve(folder_config(photos)).batch_size == 8
    device_memory = 0  # whatever does not fit is refused by the run, with its reasons
    assert resolve(folder_config(photos)).batch_size == parallel.create_mesh().size


def test_balanced_batches_hold_whole_classes(photos):
    config = resolve(folder_config(photos, **{"data.classes_per_batch": 3}))
    assert config.batch_size == 24  # 8 devices, 3 classes; 48 is above half of 32


def test_one_path_has_one_split_and_one_size(runs, photos):
    configs = {p.name: read_config(p) for p in runs.iterdir()}
    for key in ("image_size", "eval_resize", "validation_fraction", "split_seed"):
        assert len({c["data"][key] for c in configs.values()}) == 1, key
    chosen = folder_config(
        photos,
        linear_folder,
        pretrained=str(runs / "supcon"),
        **{"data.validation_fraction": 0.3},
    )
    assert resolve(chosen).data.validation_fraction == 0.3  # as it was asked for


def test_a_run_goes_on_with_what_it_began_with(runs, photos, monkeypatch):
    """Whatever would be chosen now, on other devices for example."""
    before = read_config(runs / "supcon")
    monkeypatch.setattr(defaults, "LARGEST_BATCH", 8)
    monkeypatch.setattr(defaults, "HELD_OUT", 0.5)
    again = pretrain.pretrain(folder_config(photos, total_steps=3), runs / "supcon")
    assert again["final"] and read_config(runs / "supcon") == before
    other = folder_config(photos, total_steps=3, batch_size=8)
    with pytest.raises(ValueError, match="differing: batch_size .there 16, now 8"):
        pretrain.pretrain(other, runs / "supcon")


def test_the_classifier_draws_what_it_confuses(runs):
    tables = [(runs / p / "classes.csv").read_text() for p in ("linear", "evaluate")]
    assert tables[0] == tables[1]  # of the same held-out photos
    assert [line.split(",")[1:3] for line in tables[0].splitlines()[1:]] == [
        ["ant", "4"],
        ["bee", "2"],
        ["cat", "2"],
    ]
    assert (runs / "linear/figures/confusion.png").stat().st_size > 1000


def test_unequal_classes_are_said_with_what_helps(photos, tmp_path, caplog):
    opened = run.open_run(resolve(folder_config(photos)), tmp_path / "run")
    log_data(opened)
    assert "the classes have 8 (bee) to 16 (ant) training images" in caplog.text
    for flag in (
        "--config.data.classes_per_batch=3 ",
        "--config.classifier.logit_adjustment=1 ",
        "--config.eval_metric=mean_class_accuracy",
    ):
        assert flag in caplog.text
    caplog.clear()
    treated = {
        "classifier.logit_adjustment": 1.0,
        "data.classes_per_batch": 3,
        "eval_metric": "mean_class_accuracy",
    }
    log_data(
        run.open_run(resolve(folder_config(photos, **treated)), tmp_path / "other")
    )
    assert "8 (bee) to 16 (ant)" in caplog.text and "alike" not in caplog.text


def test_files_that_are_no_images_are_named_and_counted(tmp_path, caplog):
    write_photos(tmp_path, {"ant": 10, "bee": 10})
    (tmp_path / "ant/3.jpg").write_bytes(b"")
    (tmp_path / "bee/4.jpg").write_text("<html>")
    resolve(folder_config(tmp_path, batch_size=8))
    # 16 of 20 are trained on; the others may have been held out.
    assert "images looked at cannot be read" in caplog.text
    assert "other images take their place" in caplog.text
    for photo in tmp_path.rglob("*.jpg"):
        photo.write_text("text")
    with pytest.raises(ValueError, match=r"none of 16 images .* can be read: .*\.jpg"):
        resolve(folder_config(tmp_path))


@pytest.mark.parametrize(
    "counts, says",
    [
        ({"cat": 5}, "has one class alone, 'cat'"),
        ({"cat": 0, "dog": 0}, "cat holds no images"),
        ({}, "holds no folders; expected one folder of images a class"),
    ],
)
def test_folders_that_cannot_be_used(counts, says, tmp_path):
    root = write_photos(tmp_path / "root", counts)
    root.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=says) as refusal:
        pretrain.pretrain(folder_config(root), tmp_path / "run")
    assert "\n" not in str(refusal.value) and "--config.data.root" in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_photos_without_folders_are_counted(photos, tmp_path):
    with pytest.raises(ValueError, match="ant holds no folders but 20 images"):
        resolve(folder_config(photos / "ant"))


@pytest.mark.parametrize("key", ["batch_size", "epochs", "data.image_size"])
def test_only_a_folder_is_looked_at(key, photos):
    config = folder_config(photos)
    config.data.name, config.data.eval_split = "digits", "test"
    for other in {"batch_size", "epochs", "data.image_size", "data.eval_resize"} - {
        key
    }:
        config.update_from_flattened_dict({other: 64})
    with pytest.raises(ValueError, match=f"allowed: with 'folder'.*--config.{key}"):
        check_config(config)


def test_a_plan_without_data_asks_for_values(photos):
    from supcon_jax.run.plan import create_plan

    with pytest.raises(ValueError, match="batch_size=0, .*give a value here"):
        create_plan(
            folder_config(photos), parallel.create_mesh(), num_classes=3, num_examples=9
        )


def test_show_batch_takes_the_config_as_it_is(photos, tmp_path):
    draw(resolve(folder_config(photos)), str(tmp_path / "batch.png"), rows=2)
    assert (tmp_path / "batch.png").stat().st_size > 1000
