"""The registry of encoders, and that any kind of network can be one."""

import doctest
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import linear_eval, pretrain
from supcon_jax.checkpoint import restore_encoder
from supcon_jax.models import ENCODERS, create_encoder, encoders
from tests.runs import linear_config, pretrain_config


class PatchEncoder(nn.Module):
    """No convolution but the patches', no BatchNorm, and made for one image size."""

    image_size: int
    dtype: typing.Any
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        side = self.image_size // 2
        x = nn.Conv(8, (2, 2), (2, 2), dtype=self.dtype)(images)
        x = x + self.param("positions", nn.initializers.normal(0.02), (side, side, 8))
        return jnp.mean(nn.relu(nn.LayerNorm()(x)), (1, 2)).astype(jnp.float32)


@pytest.fixture
def patches(monkeypatch):
    """The encoder under a name of its own; no file of the package is touched."""

    def build(*, image_size, width, stem, dtype, axis_name, remat):
        return PatchEncoder(image_size, dtype, axis_name)

    monkeypatch.setitem(ENCODERS, "patches", build)


@pytest.mark.slow
def test_an_encoder_without_batch_norm_runs_both_stages(patches, tmp_path):
    config = pretrain_config(
        **{"encoder.name": "patches", "encoder_average.decay": 0.9}
    )
    final = pretrain.pretrain(config, tmp_path / "pretrain")
    assert final["knn/top1"] > 0.1
    variables = restore_encoder(tmp_path / "pretrain")
    assert variables["params"]["positions"].shape == (4, 4, 8)  # of 8x8 images
    assert not jax.tree.leaves(variables["batch_stats"])
    for pretrained in (tmp_path / "pretrain", "random"):
        config = linear_config(pretrained, **{"encoder.name": "patches"})
        workdir = tmp_path / f"linear_{len(str(pretrained))}"
        assert linear_eval.linear_eval(config, workdir)["eval/num_examples"] == 500


def test_an_encoder_made_for_another_image_size_is_refused(patches, tmp_path):
    config = pretrain_config(**{"encoder.name": "patches", "knn.bank": 0})
    pretrain.pretrain(config, tmp_path / "pretrain")
    images = np.zeros((40, 12, 12, 3), np.uint8)
    labels = np.arange(40) % 4
    arrays = {
        f"{s}_{k}": v
        for s in ("train", "test")
        for k, v in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "larger.npz", **arrays)
    config = linear_config(
        tmp_path / "pretrain",
        **{
            "encoder.name": "patches",
            "data.name": "arrays",
            "data.root": str(tmp_path / "larger.npz"),
            "data.image_size": 12,
            "data.eval_resize": 12,
        },
    )
    with pytest.raises(
        ValueError, match=r"positions \(4, 4, 8\), .* \(6, 6, 8\).*size"
    ):
        linear_eval.linear_eval(config, tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


def test_refuses_unknown_names_and_empty_widths():
    with pytest.raises(ValueError, match="'resnet51'.*resnet50.*--config.encoder.name"):
        create_encoder("resnet51")
    with pytest.raises(ValueError, match="'mnist'.*cifar.*--config.encoder.stem"):
        create_encoder("resnet18", stem="mnist")
    with pytest.raises(ValueError, match="leaves no channel.*--config.encoder.width"):
        create_encoder("resnet8", width=0.01)


def test_docstring_example():
    assert doctest.testmod(encoders).failed == 0
