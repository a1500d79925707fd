"""Every key of a config changes something: the step, the first batch, or what a test sees."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from supcon_jax import builders, pretrain
from supcon_jax.config.check import check_config
from supcon_jax.config.keys import KEYS
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.run import opening as run_module
from supcon_jax.run import splits
from tests.config_files import load
from tests.runs import RESNET, first_batches

CROSS_ENTROPY = {"loss.name": "cross_entropy"}
MOMENTUM = {"loss.contrast_mode": "one", "momentum_encoder.decay": 0.9}
COSINE = {"optimizer.schedule": "cosine"}
FINETUNE = RESNET | CROSS_ENTROPY | {"mode": "finetune", "pretrained": "random"}


# What a run is made of, as text: any key that changes the computation shows here.
def tiny(**overrides):
    config = load("digits")
    config.update_from_flattened_dict(
        {
            "batch_size": 16,
            "encoder.name": "one_layer",
            "encoder.width": 1.0,
            "projection.hidden_dims": (8,),
            "optimizer.warmup_epochs": 0.1,
            "compilation_cache": False,
        }
    )
    config.update_from_flattened_dict(overrides)
    return config


_fingerprints = {}


def fingerprint(workdir, **overrides):
    """The lowered step, the initial shapes and program, and the first batch."""
    known = repr(sorted(overrides.items()))
    if known in _fingerprints:
        return _fingerprints[known]
    config = tiny(**overrides)
    check_config(config)
    run = run_module.open_run(config, workdir / str(len(_fingerprints)))
    plan = run.plan
    batch = next(first_batches(run))
    shapes = plan.abstract_state(), batch, *plan.abstract_frozen()
    text = jax.jit(plan.step).lower(*shapes).as_text()
    program = str(jax.make_jaxpr(plan.init)())
    result = (text, program, batch["id"].tobytes(), plan.total_steps)
    _fingerprints[known] = result
    return result


JITTER = {"augment.jitter_strength": 0.5, "augment.jitter_probability": 0.8}


IN_STEP = {
    "seed": (1, {}),
    "batch_size": (32, {}),
    "microbatch_size": (8, {}),
    "epochs": (7.0, {}),
    "total_steps": (9, {}),
    "data.views": (3, {}),
    "data.mean": ((0.4, 0.5, 0.5), {}),
    "data.std": ((0.4, 0.5, 0.5), {}),
    "augment.crop_area": ((0.3, 0.9), {}),
    "augment.flip": (True, {}),
    "augment.jitter_strength": (0.25, JITTER),
    "augment.jitter_probability": (0.3, JITTER),
    "augment.jitter_kind": ("tensorflow", JITTER),
    "augment.grayscale_probability": (0.2, {}),
    "augment.blur_probability": (0.5, {}),
    "augment.blur_border": ("edge", {"augment.blur_probability": 0.5}),
    "augment.extra": (("cutout",), {}),
    "augment.mixup_alpha": (0.2, CROSS_ENTROPY),
    "augment.cutmix_alpha": (1.0, CROSS_ENTROPY),
    "encoder.name": ("resnet18", RESNET),
    "encoder.width": (0.5, RESNET),
    "encoder.stem": ("imagenet", RESNET),
    "encoder.dtype": ("bfloat16", RESNET),
    "encoder.normalize_embedding": (True, RESNET),
    "encoder.batch_norm_devices": (2, RESNET),
    "encoder.batch_norm_momentum": (0.99, RESNET),
    "encoder.convention": ("torchvision", RESNET | {"encoder.stem": "imagenet"}),
    "encoder.remat": (True, RESNET),
    "projection.hidden_dims": ((9,), {}),
    "projection.output_dim": (5, {}),
    "projection.batch_norm": (True, {}),
    "projection.bias": (True, {}),
    "probe.learning_rate": (0.01, {}),
    "momentum_encoder.decay": (0.99, MOMENTUM),
    "momentum_encoder.queue_size": (32, MOMENTUM),
    "classifier.init": ("zeros", CROSS_ENTROPY),
    "classifier.logit_adjustment": (1.0, CROSS_ENTROPY),
    "finetune.stages": (2, FINETUNE),
    "finetune.layer_decay": (0.5, FINETUNE),
    "loss.name": ("simclr", {}),
    "loss.temperature": (0.2, {}),
    "loss.contrast_mode": ("one", {}),
    "loss.summation": ("inside", {}),
    "loss.denominator": ("one_positive", {}),
    "loss.positives_cap": (2, {}),
    "loss.scale": ("temperature", {}),
    "loss.hard_negative_beta": (0.5, {}),
    "loss.label_smoothing": (0.1, CROSS_ENTROPY),
    "loss.cross_entropy_weight": (0.5, {}),
    "encoder_average.decay": (0.99, {}),
    "optimizer.name": ("lars", {}),
    "optimizer.learning_rate": (0.2, {}),
    "optimizer.learning_rate_batch": (0, {}),
    "optimizer.schedule": ("constant", {}),
    "optimizer.warmup_epochs": (0.5, {}),
    "optimizer.warmup_start": (0.5, {}),
    "optimizer.cosine_end": (0.1, COSINE),
    "optimizer.decay_rate": (0.5, {"optimizer.schedule": "staircase"}),
    "optimizer.decay_epochs": (2.0, {"optimizer.schedule": "staircase"}),
    "optimizer.boundaries_epochs": ((1.0,), {"optimizer.schedule": "piecewise"}),
    "optimizer.weight_decay": (1e-3, {}),
    "optimizer.momentum": (0.5, {}),
    "optimizer.trust_coefficient": (0.01, {"optimizer.name": "lars"}),
    "optimizer.rmsprop_decay": (0.5, {"optimizer.name": "rmsprop"}),
    "optimizer.rmsprop_epsilon": (0.1, {"optimizer.name": "rmsprop"}),
    "optimizer.adam_b1": (0.5, {"optimizer.name": "adamw"}),
    "optimizer.adam_b2": (0.5, {"optimizer.name": "adamw"}),
    "optimizer.adam_epsilon": (0.1, {"optimizer.name": "adamw"}),
    "optimizer.exclude": ((), {}),
    "mode": ("linear_eval", {"pretrained": "random"}),
}


@pytest.mark.parametrize("key", IN_STEP)
def test_key_changes_what_is_computed(key, tmp_path):
    value, context = IN_STEP[key]
    before = fingerprint(tmp_path / "before", **context)
    assert before != fingerprint(tmp_path / "after", **(context | {key: value}))


@pytest.mark.parametrize("context", [{}, CROSS_ENTROPY, JITTER], ids=str)
def test_the_same_config_gives_the_same_fingerprint(context, tmp_path):
    """So that a difference above is the key's doing."""
    first = fingerprint(tmp_path / "first", **context)
    _fingerprints.clear()
    assert first == fingerprint(tmp_path / "second", **context)


# Keys whose effect is seen elsewhere, with the test that sees it.
ELSEWHERE = {
    "log_every": "test_pretrain.py::test_periods",
    "eval_every": "test_pretrain.py::test_periods",
    "checkpoint_every": "test_pretrain.py::test_periods",
    "keep_checkpoints": "test_pretrain.py::test_periods",
    "profile_steps": (
        "test_profiling.py::test_a_trace_changes_nothing_and_is_made_once"
    ),
    "next_config": "test_report.py::test_next_command",
    "encoder_average.use": "test_linear_eval.py::test_the_average_is_used_when_asked",
    "encoder.class_token": "test_vit.py::test_its_keys_are_those_of_the_config",
    "encoder.stochastic_depth": "test_vit.py::test_a_step_skips_blocks",
    "encoder.init_from": "test_weights.py::test_all_modes_start_from_a_file",
    "pretrained": "test_linear_eval.py::test_random_encoder_differs",
    "eval_metric": "test_finetune.py::test_the_headline_is_the_metric_asked_for",
    "representation": "test_probe.py::test_projections_are_those_of_the_head",
    "loss.label_similarity": (
        "test_multilabel.py::test_the_similarity_of_labels_is_that_of_the_config"
    ),
    "probe.solver": "test_probe.py::test_the_probe_is_a_whole_linear_evaluation",
    "writers": "test_writers.py::test_a_run_writes_where_its_config_says",
    "project": "test_writers.py::test_a_run_writes_where_its_config_says",
    "compilation_cache": "test_keys.py::test_compilation_cache",
    "hosts.watchdog_minutes": "test_jobs.py::test_a_stuck_process_ends_all_with_stacks",
    "data.name": "test_keys.py::test_data_keys",
    "data.dir": "test_keys.py::test_data_keys",
    "data.root": "test_keys.py::test_data_keys",
    "data.image_key": "test_tfds.py::test_features_go_by_the_names_given",
    "data.label_key": "test_tfds.py::test_features_go_by_the_names_given",
    "data.train_split": "test_keys.py::test_data_keys",
    "data.eval_split": "test_keys.py::test_data_keys",
    "data.image_size": "test_keys.py::test_data_keys",
    "data.classes": "test_keys.py::test_keys_that_choose_examples",
    "data.validation_fraction": "test_keys.py::test_keys_that_choose_examples",
    "data.fraction": "test_keys.py::test_keys_that_choose_examples",
    "data.samples_per_class": "test_keys.py::test_keys_that_choose_examples",
    "data.labelled_fraction": (
        "test_semi_supervised.py::"
        "test_a_classifier_is_trained_on_the_labelled_images_alone"
    ),
    "data.labelled_per_class": (
        "test_semi_supervised.py::test_batches_have_minus_one_where_a_label_is_hidden"
    ),
    "data.label_noise": "test_keys.py::test_keys_that_choose_examples",
    "data.split_seed": "test_keys.py::test_keys_that_choose_examples",
    "data.classes_per_batch": "test_keys.py::test_keys_that_choose_examples",
    "data.lanes": "test_tfds.py::test_lanes_read_blocks_of_the_same_images",
    "data.keep_gib": "test_tfds.py::test_lanes_read_blocks_of_the_same_images",
    "data.skip_errors": "test_keys.py::test_skip_errors",
    "data.fake": "test_keys.py::test_fake",
    "augment.policy": "test_keys.py::test_host_augmentation_keys",
    "augment.rand_augment_layers": "test_keys.py::test_host_augmentation_keys",
    "augment.rand_augment_magnitude": "test_keys.py::test_host_augmentation_keys",
    "data.eval_resize": "test_keys.py::test_eval_resize",
    "health.on_nonfinite": "test_health.py::test_skipping_is_bounded",
    "health.max_skipped": "test_health.py::test_skipping_is_bounded",
    "health.loss_rise": "test_health.py::test_the_thresholds_decide",
    "health.norm_growth": "test_health.py::test_the_thresholds_decide",
    "knn.bank": "test_keys.py::test_knn_keys",
    "knn.k": "test_keys.py::test_knn_keys",
    "knn.temperature": "test_keys.py::test_knn_keys",
    "robustness.data": "test_robustness.py::test_missing_corruptions_are_listed_and_there_is_no_mce",
    "robustness.reference": "test_robustness.py::test_another_run_as_reference",
}


def test_every_key_has_a_test_of_its_effect():
    assert set(IN_STEP) | set(ELSEWHERE) == set(KEYS)
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        text = (pathlib.Path(__file__).parent / file).read_text()
        assert f"def {name}(" in text, place


def test_data_keys(tmp_path):
    for size, name in ((8, "a.npz"), (6, "b.npz")):
        images = np.full((20, size, size, 3), size, np.uint8)
        labels = np.arange(20) % 4
        np.savez(
            tmp_path / name,
            train_images=images,
            train_labels=labels,
            test_images=images[:9],
            test_labels=labels[:9],
        )

    def sources(**overrides):
        return splits.open_sources(tiny(**overrides))

    digits = sources()
    assert [s.num_examples for s in digits] == [1297, 500]
    arrays = {"data.name": "arrays", "data.root": str(tmp_path / "a.npz")}
    assert [s.num_examples for s in sources(**arrays)] == [20, 9]
    other = arrays | {"data.root": str(tmp_path / "b.npz"), "data.image_size": 6}
    assert sources(**other)[0].images.shape == (20, 6, 6, 3)
    with pytest.raises(ValueError, match="set --config.data.image_size=6"):
        sources(**(other | {"data.image_size": 8}))
    swapped = {"data.train_split": "test", "data.eval_split": "train"}
    assert [s.num_examples for s in sources(**swapped)] == [500, 1297]
    with pytest.raises(
        ValueError, match=r"/nowhere does not exist.*--config\.data\.dir"
    ):
        sources(**{"data.name": "cifar10", "data.dir": "/nowhere"})
    with pytest.raises(ValueError, match="larger than the 20 training images"):
        sources(**arrays, **{"batch_size": 21})


def test_keys_that_choose_examples(tmp_path):
    def labels(**overrides):
        return splits.open_sources(tiny(**overrides))[0].labels.tolist()

    whole = labels()
    train, held_out = splits.open_sources(tiny(**{"data.validation_fraction": 0.2}))
    assert (train.num_examples, held_out.num_examples) == (1038, 259)
    some = splits.open_sources(tiny(**{"data.classes": (7, 1)}))
    assert [s.class_names for s in some] == [("7", "1")] * 2
    assert [len(np.unique(s.labels)) for s in some] == [2, 2]
    assert len(labels(**{"data.fraction": 0.25})) == 324
    assert len(labels(**{"data.samples_per_class": 7})) == 70
    noisy = labels(**{"data.label_noise": 0.5})
    assert 0.35 < np.mean(np.asarray(noisy) != whole) < 0.55
    chosen = {"data.fraction": 0.25}
    assert labels(**chosen) != labels(**chosen, **{"data.split_seed": 1})
    assert labels(**chosen) == labels(**chosen, seed=1)
    config = tiny(**{"data.classes_per_batch": 4})
    run = run_module.open_run(config, tmp_path)
    batch = next(first_batches(run))
    assert sorted(np.unique(batch["label"], return_counts=True)[1]) == [4] * 4
    with pytest.raises(ValueError, match=r"--config\.data\.classes_per_batch"):
        run_module.open_run(tiny(**{"data.classes_per_batch": 3}), tmp_path / "3")
    assert not (tmp_path / "3").exists()


def folder_of_noise(path, broken=False):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (path / name).mkdir(parents=True)
        for index in range(16):
            pixels = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    if broken:
        (path / "train/a/0.png").write_bytes(b"nothing")
    return {
        "data.name": "folder",
        "data.root": str(path),
        "data.eval_split": "val",
        "batch_size": 16,
    }


def test_skip_errors(tmp_path):
    broken = folder_of_noise(tmp_path / "images", broken=True)

    def epoch(**overrides):
        run = run_module.open_run(tiny(**broken, **overrides), tmp_path / "run")
        batches = first_batches(run)
        list(itertools.islice(batches, 2))
        return run.skipped

    with pytest.raises(ValueError, match=r"a/0\.png.*--config\.data\.skip_errors=True"):
        epoch()
    assert list(epoch(**{"data.skip_errors": True})) == [
        str(tmp_path / "images/train/a/0.png")
    ]


def test_fake(tmp_path):
    """A config whose data are not there runs on noise, in the shapes it would have."""
    config = load("supcon_r50")
    config.update_from_flattened_dict(
        {"data.fake": True, "data.image_size": 32, "batch_size": 8}
    )
    run = run_module.open_run(config, tmp_path)
    assert run.train_source.num_examples == 1_281_167
    one, two = itertools.islice(first_batches(run), 2)
    assert one["image"].shape == (8, 2, 32, 32, 3)
    assert one["image"] is two["image"]
    assert not np.array_equal(one["id"], two["id"])


@pytest.mark.slow
def test_host_augmentation_keys(tmp_path):
    images = folder_of_noise(tmp_path / "images")

    def first(**overrides):
        config = tiny(**images, **{"data.views": 1}, **overrides)
        run = run_module.open_run(config, tmp_path / str(len(seen)))
        seen.append(next(first_batches(run))["image"])
        return seen[-1]

    seen = []
    none, auto = first(), first(**{"augment.policy": "auto_augment"})
    rand = first(**{"augment.policy": "rand_augment"})
    layers = {"augment.rand_augment_layers": 1}
    one_layer = first(**{"augment.policy": "rand_augment"}, **layers)
    magnitude = {"augment.rand_augment_magnitude": 3.0}
    milder = first(**{"augment.policy": "rand_augment"}, **magnitude)
    trivial = first(**{"augment.policy": "trivial_augment"})
    seen_so_far = [none, auto, rand, one_layer, milder, trivial]
    for a, b in itertools.combinations(seen_so_far, 2):
        assert a.shape == b.shape and not np.array_equal(a, b)
    # Jitter comes before a policy, so it moves to the host with it.
    jitter = first(**{"augment.policy": "rand_augment"}, **JITTER)
    assert not np.array_equal(jitter, rand)
    tensorflow = {"augment.policy": "rand_augment", "augment.jitter_kind": "tensorflow"}
    assert not np.array_equal(first(**tensorflow, **JITTER), jitter)
    np.testing.assert_array_equal(first(**JITTER), none)


def test_eval_resize(tmp_path, tfds_dir):
    config = load("supcon_r50")
    config.data.dir = tfds_dir
    config.data.image_size = 32
    config.batch_size = 8
    first = []
    for resize in (32, 64):
        config.data.eval_resize = resize
        run = run_module.open_run(config, tmp_path / str(resize))
        predictor = run_module.build_predictor(run, run.plan.modules.encoder, None)
        first.append(np.asarray(next(predictor._batches(run.eval_source, ""))["image"]))
    assert first[0].shape == first[1].shape == (8, 1, 32, 32, 3)
    assert not np.array_equal(*first)


def test_knn_keys(tmp_path, monkeypatch):
    seen = {}

    def spy(bank, bank_labels, queries, query_labels, **options):
        seen.update(options, bank=len(bank))
        return knn_accuracy(bank, bank_labels, queries, query_labels, **options)

    monkeypatch.setattr(pretrain, "knn_accuracy", spy)
    config = tiny(**{"knn.bank": 100, "knn.k": 3, "knn.temperature": 0.5})
    run = run_module.open_run(config, tmp_path)
    state = jax.jit(run.plan.init)()
    metrics = pretrain.build_evaluation(run)(state)
    assert 0.1 < metrics["knn/top1"] <= 1
    assert (seen["bank"], seen["k"], seen["temperature"]) == (100, 3, 0.5)
    config.knn.bank = 0
    assert pretrain.build_evaluation(run)(state) == {}


def test_compilation_cache(tmp_path, monkeypatch):
    before = {
        "dir": jax.config.jax_compilation_cache_dir,
        "on": jax.config.jax_enable_compilation_cache,
    }
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        run_module.setup_compilation_cache(enabled=True)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "supcon_jax/jax")
        assert jax.config.jax_enable_compilation_cache
        run_module.setup_compilation_cache(enabled=False)
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_compilation_cache_dir", before["dir"])
        jax.config.update("jax_enable_compilation_cache", before["on"])


def test_auto_dtype_is_that_of_the_device():
    config = load("supcon_r50")
    assert config.encoder.dtype == "auto"
    assert builders.build_encoder(config, "cpu").dtype == jnp.float32
    for platform in ("gpu", "tpu"):
        assert builders.build_encoder(config, platform).dtype == jnp.bfloat16
    config.encoder.dtype = "bfloat16"
    assert builders.build_encoder(config, "cpu").dtype == jnp.bfloat16
