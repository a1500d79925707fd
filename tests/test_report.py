"""What a run says in words."""

import re
import time

import numpy as np

from supcon_jax import report
from supcon_jax.run import open_run
from tests.runs import pretrain_config


def test_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pretrain_config(next_config="configs/linear_digits.py")
    run = open_run(config, "a run")
    assert report.next_command(run.config, run.workdir) == (
        "python main.py --config=configs/linear_digits.py '--config.pretrained=a run'"
    )


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
        config = pretrain_config(**{"optimizer.exclude": exclude})
        run = open_run(config, tmp_path / exclude[0])
        caplog.clear()
        report.log_start(run, run.plan.init())
        assert ("matches no parameter" in caplog.text) == told
