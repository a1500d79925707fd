"""The parts of the benchmarks that are no measurements."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import cifar10, step_runs, step_tasks, train_step
from supcon_jax.config.check import check_config
from supcon_jax.losses import supcon_loss
from supcon_jax.planning.flops import count_flops, loss_flops
from tests.runs import pretrain_config


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


def test_methods_are_compared(monkeypatch, capsys):
    """From the flags to the last line, with a network that is small."""
    config = pretrain_config(**{"loss.name": "cross_entropy"})
    monkeypatch.setattr(train_step, "build_config", lambda options, method: config)
    monkeypatch.setattr(train_step, "compute_dtype", lambda options: "float32")
    options = train_step.parse(
        ["--rounds=1", "--steps=1", f"--methods={step_runs.BASELINE}"]
    )
    train_step.compare(options)
    head, _, row = capsys.readouterr().out.partition("| cross-entropy |")
    assert "| GFLOP |" in head and "| 1.000 | 1.000 |" in row
    assert "XLA's own count for the cross-entropy step" in row


def test_table_is_markdown():
    assert (
        step_runs.table(["a", "b"], [["1", "2"]])
        == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    )


# --- CIFAR-10 on one GPU ---


def write_encoded(path):
    """PNG files end to end, and the arrays that they hold."""
    rng = np.random.default_rng(0)
    content, arrays = {}, {}
    for split, count in (("train", 48), ("test", 16)):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            files.append(file.getvalue())
        content[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        content[f"{split}_sizes"] = np.array([len(file) for file in files])
        content[f"{split}_labels"] = np.arange(count) % 4
        arrays[f"{split}_images"] = images
    np.savez(path, **content)
    return arrays


def test_encoded_images_become_arrays_once(tmp_path):
    expected = write_encoded(tmp_path / "encoded.npz")
    path = cifar10.arrays_file(tmp_path / "encoded.npz", tmp_path)
    made = path.stat().st_mtime_ns
    with np.load(path) as file:
        for name, images in expected.items():
            np.testing.assert_array_equal(file[name], images)
        np.testing.assert_array_equal(file["train_labels"], np.arange(48) % 4)
    again = cifar10.arrays_file(tmp_path / "encoded.npz", tmp_path)
    assert again == path and path.stat().st_mtime_ns == made
    assert cifar10.arrays_file(path, tmp_path) == path
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(SystemExit, match="holds x; wanted: train_images"):
        cifar10.arrays_file(tmp_path / "other.npz", tmp_path)


def recorded(monkeypatch, folder, needed_s, minutes):
    """Stages that a call runs, when each needs so many seconds, by a clock of its own."""
    now, order = [0.0], []
    monkeypatch.setattr(cifar10.time, "monotonic", lambda: now[0])

    def run_stage(stage, seconds):
        path = stage.workdir / "metrics.jsonl"
        before = stage.last().get("seconds", 0.0)
        spent = min(seconds, needed_s[stage.config.partition("_")[0]] - before)
        now[0] += spent
        order.append((stage.workdir.name, spent))
        done = before + spent >= needed_s[stage.config.partition("_")[0]]
        line = {"seconds": before + spent, "epoch": 300.0 if done else 7.0}
        stage.workdir.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(line | ({"final": True, "eval/top1": 0.5} if done else {}))
        )

    monkeypatch.setattr(cifar10, "run_stage", run_stage)
    methods = cifar10.build_stages(folder, 2, (), toy=False)
    cifar10.train(methods, minutes, folder)
    return order, cifar10.table(methods, folder, "1 x TPU")


def test_both_methods_get_their_share_and_go_on_in_the_next_call(tmp_path, monkeypatch):
    needed_s = {"supcon": 400.0, "linear": 20.0, "cross": 300.0}
    order, table = recorded(monkeypatch, tmp_path, needed_s, 10.0)
    assert order == [("supcon_seed0", 300.0), ("cross_entropy_seed0", 300.0)]
    assert "| SupCon + linear | 7, 0 of 300 | - | - | 5.0, 0.0 | 1 x TPU |" in table
    assert "| cross-entropy | 300, 0 of 300 | 50.00 | 50.00 | 5.0, 0.0 |" in table
    order, _ = recorded(monkeypatch, tmp_path, needed_s, 10.0)
    assert order == [
        ("supcon_seed0", 100.0),
        ("linear_seed0", 20.0),
        ("supcon_seed1", 180.0),
        ("cross_entropy_seed1", 300.0),
    ]
    # What cross-entropy leaves, SupCon takes.
    order, table = recorded(monkeypatch, tmp_path, needed_s, 6.0)
    assert order == [
        ("supcon_seed1", 180.0),
        ("supcon_seed1", 40.0),
        ("linear_seed1", 20.0),
    ]
    assert "| 300, 300 of 300 | 50.00, 50.00 | 50.00 ± 0.00 | 7.0, 7.0 |" in table
    assert recorded(monkeypatch, tmp_path, needed_s, 6.0)[0] == []


@pytest.mark.slow
def test_cifar10_trains_end_to_end(tmp_path):
    """Encoded images, both methods, cut off and gone on with, and the table."""
    write_encoded(tmp_path / "encoded.npz")
    arguments = [
        f"--npz={tmp_path / 'encoded.npz'}",
        f"--folder={tmp_path / 'runs'}",
        *("--toy", "--seeds=1"),
    ]
    for minutes in (0.3, 30):
        cifar10.main([*arguments, f"--minutes={minutes}"])
        rows = (tmp_path / "runs" / "table.md").read_text().splitlines()
        assert len(rows) == 4
    # 6 steps of 16 of 48 images.
    assert rows[2].startswith("| SupCon + linear | 2 of 300 | ")
    assert rows[3].startswith("| cross-entropy | 2 of 300 | ")
    for row in rows[2:]:
        assert 0 <= float(row.split("|")[4]) <= 100
    seconds = json.loads((tmp_path / "runs" / "seconds.json").read_text())
    assert set(seconds) == {"supcon_seed0", "linear_seed0", "cross_entropy_seed0"}
