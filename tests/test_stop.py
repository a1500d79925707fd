"""Signals: a run is saved and ends, wherever it is, and goes on to the same bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.run.stop import Stopped, StopRequests
from supcon_jax.writers import read_metrics
from tests.runs import assert_trees_equal

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TINY = (
    "--config.batch_size=16",
    "--config.encoder.width=0.25",
    "--config.log_every=5",
    "--config.knn.bank=200",
    "--config.eval_every=0",
    "--config.checkpoint_every=0",
)


def command(workdir, *changes, config="configs/digits.py"):
    return [
        sys.executable, "-u", "main.py", f"--config={config}", f"--workdir={workdir}",
        *TINY, *changes,
    ]  # fmt: skip


def start(workdir, *changes, **options):
    return subprocess.Popen(
        command(workdir, *changes, **options),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process, text):
    """Lines of a process until one holds a text."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"no {text!r}: {process.stderr.read()}")


def whole(workdir, *changes):
    subprocess.run(
        command(workdir, *changes), cwd=REPOSITORY, check=True, capture_output=True
    )


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_in_training_saves_and_exits_0(number, tmp_path):
    """With checkpoint_every=0; the same command goes on to the bits of a whole run."""
    length = "--config.total_steps=200"
    process = start(tmp_path / "run", length)
    read_until(process, " 20/200")
    process.send_signal(number)
    asked = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert time.monotonic() - asked < 20
    (step,) = saved_steps(tmp_path / "run")
    assert f"stopped; step {step} is saved; the same command goes on: python" in out
    assert "Traceback" not in errors
    # At most one step was made after the newest that was told.
    assert step - max(r["step"] for r in read_metrics(tmp_path / "run")) <= 6
    whole(tmp_path / "run", length)
    whole(tmp_path / "whole", length)
    assert_trees_equal(
        restore_encoder(tmp_path / "run"), restore_encoder(tmp_path / "whole")
    )


@pytest.mark.slow
def test_a_signal_in_an_evaluation_saves_its_step(tmp_path):
    process = start(
        tmp_path, "--config.total_steps=1000", "--config.eval_every=20",
        "--config.data.fake=True", "--config.data.image_size=8",
        "--config.knn.bank=40000",
    )  # fmt: skip
    read_until(process, " 20/1000")
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    # The evaluation of 40,000 images takes far longer than twenty steps.
    (step,) = saved_steps(tmp_path)
    assert step % 20 == 0 and f"step {step} is saved" in out


def test_a_signal_before_the_first_step_ends_at_once(tmp_path):
    process = start(tmp_path, "--config.total_steps=400")
    read_until(process, "input:")  # it compiles now
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "nothing was saved yet; the same command goes on: python" in out
    assert saved_steps(tmp_path) == []


@pytest.mark.slow
def test_a_signal_in_linear_evaluation(tmp_path):
    whole(tmp_path / "pretrain", "--config.total_steps=20")
    options = (
        f"--config.pretrained={tmp_path / 'pretrain'}", "--config.total_steps=300",
    )  # fmt: skip
    results = []
    for name in ("run", "whole"):
        if name == "run":
            process = start(
                tmp_path / name, *options, config="configs/linear_digits.py:sgd"
            )
            read_until(process, " 20/300")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0
        done = subprocess.run(
            command(tmp_path / name, *options, config="configs/linear_digits.py:sgd"),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results.append(read_metrics(tmp_path / name)[-1]["eval/loss"])
    assert results[0] == results[1]


def test_a_second_run_on_one_workdir_is_refused(tmp_path):
    """And a crash leaves no lock behind."""
    first = start(tmp_path, "--config.total_steps=100000")
    read_until(first, " 20/100000")
    second = subprocess.run(
        command(tmp_path, "--config.total_steps=100000"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2
    assert f"is in use by another run (process {first.pid} on " in second.stderr
    first.kill()
    first.wait()
    third = start(tmp_path, "--config.total_steps=100000")
    read_until(third, " 5/100000")
    third.kill()
    third.wait()


@pytest.mark.slow
def test_the_account_of_a_run_goes_on_over_a_restart(tmp_path):
    length = "--config.total_steps=60"
    process = start(tmp_path, length, "--config.checkpoint_every=20")
    read_until(process, " 30/60")
    process.kill()
    process.wait()
    whole(tmp_path, length)
    last = read_metrics(tmp_path)[-1]
    assert 0 < last["goodput/share"] < 1
    for part in ("start", "compile", "eval", "save"):
        assert last[f"goodput/{part}_s"] > 0, part
    # Steps 21 to 30 were made twice.
    assert last["goodput/lost_s"] > 0
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert last["goodput/start_s"] > first["goodput/start_s"]


# --- the object by itself ---


def test_requests_in_this_process():
    handler = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        assert not stop.due()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.due()
        with pytest.raises(Stopped), stop.interruptible():
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_cannot_be_cut_off_is_waited_for():
    with StopRequests() as stop:
        assert stop.wait_for(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            stop.wait_for(lambda: 1 / 0)
        ended = threading.Event()
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        begun = time.monotonic()
        with pytest.raises(Stopped):
            stop.wait_for(lambda: ended.wait(30))
        assert time.monotonic() - begun < 10
        ended.set()


def test_other_threads_hear_nothing():
    found = []

    def enter():
        with StopRequests() as stop:
            found.append(stop.due())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]
