"""What is installed works without the checkout: the command, configs, studies, the loss."""

import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

from supcon_jax.config import files as config_files
from supcon_jax.run import stop

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_files_are_found_here_and_beside_the_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config_files.find_file("configs/digits.py") == ROOT / "configs/digits.py"
    assert "configs/digits.py" in config_files.config_files()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("")
    assert config_files.find_file("configs/mine.py") == pathlib.Path("configs/mine.py")
    assert config_files.config_files() == ["configs/mine.py"]
    assert config_files.find_file("configs/none.py") is None


@pytest.mark.parametrize(
    ("started", "told"),
    [
        ("main.py", "python main.py --config=a"),
        ("/env/bin/supcon-jax", "python main.py --config=a"),
        ("/code/supcon_jax/__main__.py", "python main.py --config=a"),
        ("/code/supcon_jax/tools/study.py", "python /code/supcon_jax/tools/study.py"),
    ],
)
def test_the_command_that_goes_on_is_one_that_can_be_typed(monkeypatch, started, told):
    arguments = ["--config=a"] if "tools" not in started else []
    monkeypatch.setattr(sys, "argv", [started, *arguments])
    assert stop.restart_command() == told


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(tmp_path):
    """Needs the package index: everything is installed anew."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env" / "bin"
    (wheel,) = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {"supcon_jax/py.typed", "supcon_jax/page/style.css"} < {*names}
    subprocess.run([bin_ / "python", "-m", "pip", "install", "-q", wheel], check=True)

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    trained = run(
        bin_ / "supcon-jax", "--config=configs/digits.py", "--config.total_steps=5"
    )
    (next_line,) = [line for line in trained.splitlines() if "Next:" in line]
    command = next_line.partition("Next:")[2].split()
    assert command[0] == "supcon-jax"
    assert "top-1" in run(bin_ / command[0], *command[1:])
    told = run(
        *(bin_ / "python", "-m", "supcon_jax.tools.study"),
        *("studies/temperature.py", "--dry_run"),
    )
    assert "0 of 30 jobs are done" in told
    code = (
        "import sys; from supcon_jax import supcon_loss; print('absl' in sys.modules)"
    )
    assert run(bin_ / "python", "-c", code).strip() == "False"
