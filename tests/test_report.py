"""What a run says in words."""

import re
import shlex
import time

import numpy as np
import pytest

from configs import digits, linear_digits, supcon_folder
from supcon_jax import storage
from supcon_jax.config.files import config_files
from supcon_jax.config.loading import load_config
from supcon_jax.run import report
from supcon_jax.run.opening import open_run
from tests.runs import RESNET, pretrain_config


def test_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(digits.get_config(), "a run")
    assert report.next_command(run.config, run.workdir) == (
        "python main.py --config=configs/linear_digits.py '--config.pretrained=a run'"
    )


def test_the_next_command_carries_what_the_next_config_has_otherwise(tmp_path):
    """Other images would be seen, and another encoder would be refused."""
    changes = {
        "next_config": "configs/linear_digits.py",
        "encoder.width": 0.5,
        "data.classes": (1, 7),
        "data.labelled_per_class": 5,
        "data.split_seed": 3,
    }
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    command = shlex.split(report.next_command(config, tmp_path / "run"))
    path = storage.shown(tmp_path / "run")
    assert command[3:] == [f"--config.pretrained={path}"] + [
        f"--config.{key}={value}"
        for key, value in (
            ("data.split_seed", 3),
            ("data.classes", (1, 7)),
            ("data.labelled_per_class", 5),
            ("encoder.width", 0.5),
        )
    ]
    following = load_config(changes["next_config"], [word[9:] for word in command[3:]])
    assert following.encoder.width == 0.5 and following.data.classes == (1, 7)
    # What only measures sees no training images.
    config = linear_digits.get_config()
    config.encoder.width, config.data.labelled_per_class = 0.5, 5
    assert report.next_command(config, tmp_path / "run").endswith(
        f"--config.pretrained={path} --config.encoder.width=0.5"
    )


def test_what_a_folder_decides_is_not_carried(tmp_path):
    """The next run has the images and the split of this one without being told."""
    config = supcon_folder.get_config()
    config.data.image_size = config.data.eval_resize = 64
    config.data.eval_split, config.data.validation_fraction = "train", 0.2
    command = report.next_command(config, tmp_path / "run")
    assert command.endswith(storage.shown(tmp_path / "run"))


@pytest.mark.parametrize("name", config_files())
def test_configs_that_follow_each_other_go_together(name, tmp_path):
    """Their next command needs nothing but the run."""
    config = load_config(name, [])
    if config.next_config.startswith("configs/"):
        command = report.next_command(config, tmp_path)
        changed = [word for word in command.split() if word.startswith("--config.")]
        assert all(word.startswith("--config.pretrained=") for word in changed), command


def test_a_tool_may_be_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pretrain_config(next_config="supcon_jax.tools.predict")
    assert report.next_command(config, tmp_path / "run", "my photos/cat.jpg") == (
        "python -m supcon_jax.tools.predict run 'my photos/cat.jpg'"
    )


def test_input_line_measures_the_host_and_passes_every_batch(caplog):
    def batches(seconds):
        for number in range(4):
            time.sleep(seconds)
            yield {"image": np.zeros((6, 2, 8, 9, 3), np.uint8), "number": number}

    seen = report.measure_input(batches(0.2), batch_size=24)
    assert [batch["number"] for batch in seen] == [0, 1, 2, 3]
    (line,) = (r.getMessage() for r in caplog.records if "input:" in r.getMessage())
    assert "a step needs 24 images (2 views, 8x9), 6 from this host" in line
    rate = float(re.search(r"make ([\d.]+) images/s", line).group(1))
    assert 0 < rate <= 30.1  # 6 images in 0.2 s, or longer on a busy machine
    assert float(re.search(r"at least ([\d.]+) ms", line).group(1)) >= 199


def test_start_says_what_is_about_to_run(tmp_path, caplog):
    config = pretrain_config(**{"optimizer.warmup_epochs": 5.0})
    run = open_run(config, tmp_path)
    report.log_start(run, run.plan.init())
    assert "supcon on digits: 1,297 training images, 10 classes" in caplog.text
    assert "global batch 16 images x 2 views, 12 steps" in caplog.text
    # 5 epochs of 1297 / 16 steps do not fit into 12.
    assert "the warm-up takes 405 steps, so this run of 12 ends" in caplog.text


def test_an_exclusion_that_matches_nothing_is_told(tmp_path, caplog):
    for exclude, told in ((("batch_norm",), False), (("layer_norm",), True)):
        config = pretrain_config(**RESNET, **{"optimizer.exclude": exclude})
        run = open_run(config, tmp_path / exclude[0])
        caplog.clear()
        report.log_start(run, run.plan.init())
        assert ("matches no parameter" in caplog.text) == told
