"""The command line: one line and exit code 2 for every mistake."""

import pathlib
import signal
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments, cwd=REPOSITORY, env=None):
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--config=FILE"),
        (["--config=configs/digit.py"], "configs/digits.py"),
        (["--config=configs/linear_digits.py:rand"], "unknown variant 'rand'"),
        (
            ["--config=configs/digits.py", "--config.loss.temperatur=1"],
            "loss.temperature",
        ),
        (
            ["--config=configs/digits.py", "--config.learning_rate=1"],
            "optimizer.learning",
        ),
        (["--config=configs/digits.py", "--config.batch_size=many"], "batch_size"),
        (["--config=configs/digits.py", "--wrkdir=x"], "workdir"),
        (["--config=configs/digits.py", "again"], "unexpected argument 'again'"),
        (
            ["--config=configs/digits.py", "--config.mode=train"],
            "pretrain, linear_eval",
        ),
        (["--config=configs/digits.py", "--config.loss.temperature=0"], "above 0"),
        (["--config=configs/linear_digits.py", "--config.pretrained=no"], "'no'"),
        (["--config=configs/supcon_r50.py", "--config.data.dir=no"], "image-net.org"),
    ],
)
def test_mistake_is_one_line_and_code_2(arguments, says, tmp_path):
    workdir = tmp_path / "run"
    result = run(*arguments, *([f"--workdir={workdir}"] if arguments else []))
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    assert not workdir.exists()


def test_default_workdir_and_output(tmp_path):
    """The README's command, cut short: what a user sees."""
    for name in ("main.py", "configs", "supcon_jax"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    result = run(
        "--config=configs/digits.py",
        "--config.total_steps=2",
        "--config.batch_size=16",
        "--config.encoder.width=0.25",
        "--config.knn.bank=100",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "digits" / "metrics.jsonl").exists()
    assert result.stdout.startswith("workdir runs/digits\n")
    for words in ("ETA", "images/s", "collapse", "Result:", "Next:    python main.py"):
        assert words in result.stdout, words
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_interrupt_is_one_line(tmp_path):
    """Ctrl-C in the middle of a run; what has been saved stays."""
    process = subprocess.Popen(
        [
            sys.executable,
            "main.py",
            "--config=configs/digits.py",
            "--config.total_steps=100000",
            "--config.log_every=10",
            "--config.checkpoint_every=10",
            "--config.batch_size=16",
            "--config.encoder.width=0.25",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step") and " 20/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "error: interrupted; the same command goes on" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()
