"""docs/extending.md: its examples are one program, which runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import supcon_jax

REPOSITORY = pathlib.Path(supcon_jax.__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_examples_run(tmp_path):
    text = (REPOSITORY / "docs" / "extending.md").read_text()
    program = "\n\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    (tmp_path / "my_experiment.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "my_experiment.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    named = set(re.findall(r'(?:try_it\("|runs/my_)(\w+)"', program))
    assert runs == {f"my_{name}" for name in named}
    lines = (tmp_path / "runs" / "my_tracker" / "loss.csv").read_text().splitlines()
    assert lines[0].startswith("1,") and lines[-1].startswith("4,")
