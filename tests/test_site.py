"""The documentation builds as a site, without a warning."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_with_every_link_and_docstring(tmp_path):
    pytest.importorskip("sphinx", reason='needs pip install -e ".[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    assert "supcon_jax.supcon_loss" in page
    assert "temperature" in page
