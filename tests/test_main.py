"""The command line: one line and exit code 2 for every mistake."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from supcon_jax.checkpoint import saved_steps

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
        (["--config", "configs/nope.py"], "no config file 'configs/nope.py'"),
        (["--config=configs/digits.py", "--config.optimizer.exclude=('*bn',)"], "regu"),
        (
            ["--config=configs/digits.py", "--config.augment.crop_area=('a','b')"],
            "leas",
        ),
        (
            ["--config=configs/digits.py", "--config.projection.hidden_dims=(64.5,)"],
            "wh",
        ),
        (["--config=configs/digits.py", "--config.writers=('mlflow',)"], "tensorboard"),
        (
            [
                "--config=configs/digits.py",
                "--config.loss.name=simclr",
                "--config.data.views=1",
            ],
            "no image has a positive",
        ),
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


SHORT = (
    "--config.total_steps=2",
    "--config.batch_size=16",
    "--config.encoder.width=0.25",
    "--config.knn.bank=0",
)


def test_config_without_a_file():
    done = run("--config")
    assert done.returncode == 2 and "--config needs a file, one of: " in done.stderr


def test_config_after_a_space_and_from_another_folder(tmp_path):
    """`python /elsewhere/main.py --config configs/digits.py` in an empty folder."""
    done = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "main.py",
            "--config",
            "configs/digits.py",
            *SHORT,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "metrics.jsonl").exists()


def test_a_device_that_is_not_there(tmp_path):
    for platform in ("cuda", "abacus"):
        environment = os.environ | {"JAX_PLATFORMS": platform}
        done = run(
            "--config=configs/digits.py",
            f"--workdir={tmp_path / 'run'}",
            env=environment,
        )
        assert done.returncode == 2, done.stderr
        assert f"JAX_PLATFORMS='{platform}'" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.slow
def test_without_a_home(tmp_path):
    """No HOME and no such user: nothing is cached, and the run goes on."""
    environment = {k: v for k, v in os.environ.items() if k != "HOME"}
    environment.pop("XDG_CACHE_HOME", None)
    code = "import os, runpy, sys; sys.argv = sys.argv[1:]; os.path.expanduser = lambda p: p; runpy.run_path('main.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "main.py", "--config=configs/digits.py", *SHORT]
        + [f"--workdir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not (REPOSITORY / "~").exists()


def test_a_closed_pipe_does_not_stop_a_run(tmp_path):
    """`python main.py ... | head -1`: log.txt has the rest."""
    command = [sys.executable, "main.py", "--config=configs/digits.py", *SHORT]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(300) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert "finished 2 steps" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_an_odd_encoding_shows_what_it_can(tmp_path):
    """A folder of a name that ASCII does not have."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    workdir = tmp_path / "l\u00e4ufe"
    done = run(
        "--config=configs/digits.py", *SHORT, f"--workdir={workdir}", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    assert "l\\xe4ufe" in done.stdout
    assert "l\u00e4ufe" in (workdir / "log.txt").read_text(encoding="utf-8")


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
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    told = [line for line in out.splitlines() if line.startswith("stopped; step ")]
    assert len(told) == 1 and "is saved; the same command goes on: python" in told[0]
    assert "Traceback" not in errors
    # The two newest are kept: the last one on the way, and that of the stop.
    steps = saved_steps(tmp_path / "run")
    assert len(steps) == 2 and steps[0] >= 20
    assert told[0].startswith(f"stopped; step {steps[1]} is saved")
