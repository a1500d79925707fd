"""The picture of a batch: what it shows is what a training step sees."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from supcon_jax import builders
from supcon_jax.config.check import check_config
from supcon_jax.run.opening import open_run
from supcon_jax.tools import show_batch
from tests.runs import first_batches


def digits(*changes):
    return show_batch.load_config("configs/digits.py", ["batch_size=16", *changes])


def test_rows_are_those_of_the_first_step(tmp_path):
    config = digits("augment.jitter_strength=0.5", "augment.jitter_probability=1.0")
    whole, views, labels = show_batch.first_views(config, 5)
    check_config(config)
    run = open_run(config, tmp_path)
    batch = next(first_batches(run))
    seen = builders.build_augmentation(config, run.mesh, whole_images=True)
    expected = seen(jnp.asarray(batch["image"]), jnp.asarray(batch["id"]))
    mean, std = np.asarray(config.data.mean), np.asarray(config.data.std)
    np.testing.assert_allclose(
        views, np.clip(expected[:5] * std + mean, 0, 1), atol=2e-6
    )
    np.testing.assert_array_equal(labels, batch["label"][:5])
    index = batch["id"][:5, 1]
    np.testing.assert_array_equal(whole, run.train_source.images[index])


def test_command_draws_every_view(tmp_path, capsys):
    sizes = []
    for views in (1, 3):
        out = tmp_path / f"{views}.png"
        show_batch.main(
            [
                "--config=configs/digits.py",
                f"--config.data.views={views}",
                "--config.batch_size=16",
                "--rows=2",
                f"--out={out}",
            ]
        )
        assert capsys.readouterr().out == f"wrote {out}\n"
        with Image.open(out) as picture:
            sizes.append(picture.size)
    assert sizes[1][0] > 1.5 * sizes[0][0] and sizes[1][1] == sizes[0][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=nowhere.py"], "no config file 'nowhere.py'"),
        (
            ["--config=configs/digits.py", "--config.augment.polcy=none"],
            "did you mean --config.augment.policy",
        ),
        (
            ["--config=configs/digits.py", "--config.augment.policy=nothing"],
            "--config.augment.policy",
        ),
        (
            ["--config=configs/digits.py", "--config.data.views=two"],
            "--config.data.views",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "batch.png"
    with pytest.raises(SystemExit) as exit:
        show_batch.main([*arguments, f"--out={out}"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
