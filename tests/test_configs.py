"""Every config file loads and says what it is; every wrong value is refused."""

import importlib
import inspect
import re

import pytest

from configs import common
from supcon_jax.config.check import check_config, flatten
from supcon_jax.config.keys import ENCODER_KEYS, KEYS
from supcon_jax.run import opening as run_module
from tests.config_files import ALL, FILES, load, load_named
from tests.test_keys import CROSS_ENTROPY, MOMENTUM, tiny


@pytest.mark.parametrize("stem, variant", ALL)
def test_config_is_valid_and_locked(stem, variant):
    config = load(stem, variant)
    check_config(config)
    with pytest.raises(AttributeError):
        config.optimizer.lr = 1.0
    if config.next_config.startswith("supcon_jax.tools."):
        assert stem == "linear_folder"  # photos are what `predict` takes
    elif config.next_config:
        following = load_named(config.next_config)
        if following.mode == "linear_eval":
            ours, theirs = config.to_dict(), following.to_dict()
            ours, theirs = flatten(ours), flatten(theirs)
            for key in ENCODER_KEYS:
                assert ours[key] == theirs[key], key
            # The default workdir, as main.py names it.
            workdir = f"runs/{stem}_{variant}" if variant else f"runs/{stem}"
            assert following.pretrained == workdir


@pytest.mark.parametrize("stem", FILES)
def test_config_header_says_command_hardware_and_time(stem):
    header = importlib.import_module(f"configs.{stem}").__doc__
    assert f"python main.py --config=configs/{stem}.py" in header
    for word in ("ardware|accelerator|CPU", "Time|minutes"):
        assert re.search(word, header), word


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'rand'.*'random'"):
        load("linear_digits", "rand")


def test_every_key_is_documented_and_has_a_rule():
    config = common.get_config()
    assert set(flatten(config.to_dict())) == set(KEYS)
    text = inspect.getsource(common.get_config)
    lines = re.findall(r"^    config\.([\w.]+) = (?!ConfigDict).*", text, re.M)
    assert sorted(lines) == sorted(KEYS)


def test_the_defaults_of_the_schema_are_those_of_common():
    """Older runs that lack a key are read with them."""
    assert {k: v.default for k, v in KEYS.items()} == flatten(
        common.get_config().to_dict()
    )


def test_check_config_names_what_is_wrong():
    config = common.get_config()
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(
        ValueError, match="did you mean --config.optimizer.learning_rate"
    ):
        check_config(config)
    config = common.get_config()
    with config.unlocked():
        del config.knn.k
    with pytest.raises(ValueError, match=r"knn\.k.*missing"):
        check_config(config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("mode", "train"),
        ("batch_size", 0),
        ("epochs", 0.0),
        ("epochs", float("nan")),
        ("seed", -1),
        ("encoder.name", "resnet51"),
        ("data.classes", (3,)),
        ("data.classes", (3, 3)),
        ("data.classes", (3, -1)),
        ("augment.crop_area", (0.5, 0.2)),
        ("augment.crop_area", (0.5,)),
        ("data.std", (1.0, 0.0, 1.0)),
        ("data.mean", (1.0, 0.0)),
        ("loss.temperature", 0.0),
        ("loss.scale", "big"),
        ("loss.scale", "-1"),
        ("loss.label_similarity", "dice"),
        ("loss.hard_negative_beta", -0.5),
        ("loss.label_smoothing", 1.0),
        ("optimizer.name", "adam"),
        ("optimizer.momentum", 1.0),
        ("optimizer.adam_b2", 1.0),
        ("projection.hidden_dims", (64.5,)),
        ("projection.hidden_dims", (10**9,)),
        ("projection.output_dim", 10**9),
        ("encoder.width", 1e9),
        ("augment.crop_area", ("a", "b")),
        ("optimizer.exclude", ("",)),
        ("data.eval_resize", 16),
    ],
)
def test_refused_values(key, value):
    config = common.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"--config\.{re.escape(key)}") as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value)
    assert "allowed" in str(refusal.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"momentum_encoder.queue_size": 512}, "without a momentum encoder"),
        ({"momentum_encoder.decay": 0.9}, "loss.contrast_mode='all' .* 'one'"),
        (MOMENTUM | {"loss.name": "cross_entropy"}, "loss.name='cross_entropy'"),
        (MOMENTUM | {"loss.positives_cap": 2}, "loss.positives_cap=2"),
        ({"projection.output_dim": 0}, "hidden_dims=.2048,.; allowed: no hidden"),
        ({"augment.jitter_strength": 0.0}, "jitters nothing; allowed: both above 0"),
        ({"augment.jitter_probability": 0.0}, "jitters nothing; allowed: both above 0"),
        (
            {
                "projection.output_dim": 0,
                "projection.hidden_dims": (),
                "representation": "projection",
            },
            "projection.output_dim=0, which is no head",
        ),
        (MOMENTUM | {"data.views": 1}, "data.views=1 .* at least 2"),
        (MOMENTUM | {"momentum_encoder.queue_size": 255}, "at least the 256 keys"),
        ({"classifier.logit_adjustment": 1.0}, "where a classifier is trained"),
        (CROSS_ENTROPY | {"probe.learning_rate": 0.1}, "beside a contrastive loss"),
        ({"mode": "linear_eval", "probe.learning_rate": 0.1}, "mode=linear_eval"),
        (
            CROSS_ENTROPY | {"loss.cross_entropy_weight": 0.1},
            "beside a contrastive loss",
        ),
        (
            {"probe.learning_rate": 0.1, "loss.cross_entropy_weight": 1.0},
            "one of them",
        ),
        ({"encoder_average.use": True}, "allowed: with mode=linear_eval"),
        (
            {"mode": "linear_eval", "encoder_average.decay": 0.9},
            "allowed: with mode=pretrain",
        ),
        ({"mode": "finetune"}, "loss.name=supcon with mode=finetune"),
        ({"finetune.stages": 1}, "finetune.stages=1 with mode=pretrain"),
        (
            {"mode": "linear_eval", "finetune.layer_decay": 0.5},
            "finetune.layer_decay=0.5 with mode=linear_eval",
        ),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together(changes, says):
    config = common.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=says) as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value) and "--config." in str(refusal.value)
    assert "allowed" in str(refusal.value)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("microbatch_size", 12, "set --config.microbatch_size=8 or 16, or 0"),
        ("encoder.batch_norm_devices", 3, "allowed: 0 .all., 1, 2, 4, 8"),
    ],
)
def test_sizes_that_the_devices_cannot_share(key, value, says, tmp_path):
    with pytest.raises(ValueError, match=says) as refusal:
        run_module.open_run(tiny(**{key: value}), tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()
