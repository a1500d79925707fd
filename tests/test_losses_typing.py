"""What a type checker, and so an editor, knows of the losses."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

SNIPPET = """
from typing import assert_type

import jax
import numpy as np

from supcon_jax import supcon_loss
from supcon_jax.losses import momentum_contrast_loss

Pair = tuple[jax.Array, dict[str, jax.Array]]


def check(x: jax.Array, y: jax.Array, flag: bool) -> None:
    assert_type(supcon_loss(x, y), jax.Array)
    assert_type(supcon_loss(np.ones((2, 2, 3))), jax.Array)
    assert_type(supcon_loss(x, y, with_diagnostics=False), jax.Array)
    assert_type(supcon_loss(x, y, with_diagnostics=True), Pair)
    assert_type(supcon_loss(x, y, with_diagnostics=flag), jax.Array | Pair)
    assert_type(momentum_contrast_loss(x, y, x, y), jax.Array)
    assert_type(momentum_contrast_loss(x, y, x, y, with_diagnostics=True), Pair)
    assert_type(
        momentum_contrast_loss(x, y, x, y, with_diagnostics=flag), jax.Array | Pair
    )
"""


@pytest.fixture(scope="module")
def check_types(tmp_path_factory):
    """A function from a program to the exit code and the words of mypy."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy, which is not installed")
    folder = tmp_path_factory.mktemp("types")

    def check(text):
        (folder / "snippet.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--ignore-missing-imports",
             f"--cache-dir={folder / 'cache'}", str(folder / "snippet.py")],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return check


def test_an_editor_knows_when_a_loss_is_a_pair(check_types):
    code, words = check_types(SNIPPET)
    assert code == 0, words


def test_the_snippet_fails_where_a_type_is_another(check_types):
    """The test above has teeth, and a wrong argument is found."""
    code, words = check_types(
        SNIPPET.replace("with_diagnostics=True), Pair", "), Pair")
        + "\n\nsupcon_loss(np.ones((2, 2, 3)), temprature=0.1)\n"
    )
    assert code == 1
    assert words.count("assert-type") == 2 and "temprature" in words


def test_installed_packages_are_marked_as_typed():
    """A wheel holds every file of the package (tests/test_wheel.py builds one)."""
    assert (ROOT / "supcon_jax" / "py.typed").is_file()
    assert 'packages = ["supcon_jax"]' in (ROOT / "pyproject.toml").read_text()
