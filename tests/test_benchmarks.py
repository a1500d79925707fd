"""The parts of the benchmarks that are no measurements."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_runs, step_tasks, train_step
from supcon_jax.config import check_config
from supcon_jax.losses import supcon_loss
from supcon_jax.planning.flops import count_flops, loss_flops


def test_products_count_two_operations_a_multiply_add():
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((3, 7)), None, 4)[
            0
        ]

    assert count_flops(loop, a, b) == 4 * 2 * 3 * 5 * 7


def test_convolutions_count_each_output_by_its_window():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(x, kernel, padding="VALID"):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count_flops(convolve, x, kernel) == 2 * (2 * 3 * 3 * 5) * (3 * 3 * 3)
    padded = functools.partial(convolve, padding="SAME")
    # Four windows a side, of which the last one reaches a pixel over the border.
    assert count_flops(padded, x, kernel) == 2 * (2 * 11 * 11 * 5) * 3


def test_the_formula_of_the_loss_is_what_the_program_does():
    """With one block a tile is the whole matrix; the diagonal is no saving yet."""
    # So many views that no tile is kept: the backward makes them again.
    x, labels = jnp.zeros((2048, 2, 16)), jnp.zeros((2048,), jnp.int32)
    gradient = jax.grad(lambda x: supcon_loss(x, labels, block_size=256))
    assert count_flops(gradient, x) == pytest.approx(loss_flops(4096, 16), rel=0.1)
    assert loss_flops(1024, 16, devices=8) == 6 * 1024**2 * 16


def test_peaks_are_those_of_bfloat16():
    assert train_step.peak_tflops("NVIDIA H200", "bfloat16") == 989
    assert train_step.peak_tflops("TPU v5 lite", "bfloat16") == 197
    assert train_step.peak_tflops("NVIDIA H200", "float32") is None
    assert train_step.peak_tflops("cpu", "bfloat16") is None


@pytest.mark.parametrize("method", step_runs.METHODS)
def test_methods_are_configs_that_differ_in_what_they_name(method):
    options = train_step.parse(["--batch=64", "--microbatches=4"])
    config = step_runs.build_config(options, method)
    check_config(config)
    names = {"cross-entropy": "cross_entropy", "SimCLR": "simclr"}
    assert config.loss.name == names.get(method, "supcon")
    assert config.microbatch_size == (16 if method == "microbatched" else 0)
    assert config.encoder.remat == (method == "remat")


@pytest.mark.parametrize(
    "flags", [["--methods=moco"], ["--batch=10"], ["--encoder=vgg"]]
)
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train_step.parse(flags)
    assert "error:" in capsys.readouterr().err


def test_collectives_are_counted_once_each():
    text = """
  %a = f32[2]{0} all-reduce(%x), channel_id=1
  %b = (f32[2], f32[3]) all-reduce-start(%y, %z), channel_id=2
  %c = (f32[2], f32[3]) all-reduce-done(%b)
  %d = f32[8]{0} all-gather(%x), dimensions={0}
"""
    counts = step_tasks.count_collectives(text)
    assert (counts["all-reduce"], counts["all-gather"]) == (2, 1)
    assert counts["reduce-scatter"] == 0


def test_table_is_markdown():
    assert (
        step_runs.table(["a", "b"], [["1", "2"]])
        == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    )
