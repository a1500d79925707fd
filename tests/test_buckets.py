"""A run whose workdir and data are in a bucket, against an emulator of one."""

import json
import pathlib
import threading
import time

import numpy as np
import pytest
from PIL import Image

from supcon_jax import storage
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.data.datasets import open_source
from supcon_jax.linear_eval import linear_eval
from supcon_jax.pretrain import pretrain
from supcon_jax.writers import MetricWriter, read_metrics
from tests.runs import assert_trees_equal, linear_config, pretrain_config


class Killed(Exception):
    """Stands for a SIGKILL: nothing is saved after it."""


def killed_at(monkeypatch, step):
    """Ends the next run when it tells of a step."""
    log_progress = MetricWriter.log_progress

    def killing(self, at, *arguments):
        log_progress(self, at, *arguments)
        if at >= step:
            monkeypatch.undo()
            raise Killed

    monkeypatch.setattr(MetricWriter, "log_progress", killing)


def arrays_in(place):
    """The digits, as an .npz file."""
    arrays = {}
    for split in ("train", "test"):
        source = open_source("digits", split)
        arrays |= {f"{split}_images": source.images, f"{split}_labels": source.labels}
    path = storage.join(place, "digits.npz")
    with storage_file(path) as file:
        np.savez(file, **arrays)
    return path


def storage_file(path):
    import contextlib
    import io

    @contextlib.contextmanager
    def opened():
        content = io.BytesIO()
        yield content
        storage.write(path, content.getvalue())

    return opened()


def test_the_journey_of_the_digits_in_a_bucket(bucket, tmp_path, monkeypatch, messages):
    """Pretraining, a kill, a resume, a move, linear evaluation: the bits of a disk."""
    (tmp_path / "data").mkdir()
    changes = {"data.name": "arrays", "checkpoint_every": 4, "log_every": 1}
    local = pretrain_config(**changes, **{"data.root": arrays_in(tmp_path / "data")})
    remote = pretrain_config(**changes, **{"data.root": arrays_in(f"{bucket}/data")})
    expected = pretrain(local, tmp_path / "run")
    killed_at(monkeypatch, 7)
    with pytest.raises(Killed):
        pretrain(remote, f"{bucket}/run/")
    assert saved_steps(f"{bucket}/run") == [4]
    final = pretrain(remote, f"{bucket}/run")
    assert "resumed at step 4" in messages
    assert final["train/loss"] == expected["train/loss"]
    assert saved_steps(f"{bucket}/run") == saved_steps(tmp_path / "run") == [8, 12]
    # Every step once, as on a disk.
    lines = [[r["step"] for r in read_metrics(w)] for w in (f"{bucket}/run", tmp_path / "run")]
    assert lines[0] == lines[1]
    names = storage.walk(f"{bucket}/run")
    assert {"config.json", "run.json", "log.txt", "figures/curves.png"} <= set(names)
    assert sum(name.startswith("tensorboard/") for name in names) == 2
    assert "lock" not in names
    assert "resumed at step 4" in storage.read_text(f"{bucket}/run/log.txt")
    storage.move(f"{bucket}/run", f"{bucket}/moved")
    assert not storage.exists(f"{bucket}/run")
    ours, theirs = restore_encoder(f"{bucket}/moved"), restore_encoder(tmp_path / "run")
    assert_trees_equal(ours, theirs)
    results = [
        linear_eval(linear_config(pretrained), place)["eval/top1"]
        for pretrained, place in (
            (f"{bucket}/moved", f"{bucket}/linear"),
            (tmp_path / "run", tmp_path / "linear"),
        )
    ]
    assert results[0] == results[1]
    # The same command again: it is complete, and says the same.
    assert pretrain(remote, f"{bucket}/moved")["train/loss"] == final["train/loss"]
    assert f"Workdir: {bucket}/moved" in messages
