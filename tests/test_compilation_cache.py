"""A damaged compilation cache costs compilations: no crash, and no other program."""

import shutil

import numpy as np
import pytest

from supcon_jax.checkpoint import restore_encoder
from tests.damage import KINDS, damage, files_of
from tests.processes import main_job
from tests.runs import assert_trees_equal

STEPS = {"total_steps": 4, "log_every": 10}


@pytest.mark.slow
def test_every_file_damaged_in_every_way(tmp_path):
    cache, filled = tmp_path / "cache", tmp_path / "filled"
    environ = {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def run(name):
        workdir = tmp_path / name.replace(" ", "_")
        with main_job(1, workdir, environs=[environ], **STEPS) as job:
            assert job.wait(400) == {0: 0}, job[0].err
        assert "Traceback" not in job[0].err
        return restore_encoder(workdir)

    expected = run("filled by this")
    shutil.copytree(cache, filled)
    rng = np.random.default_rng(0)
    for kind in (*KINDS, "emptied"):
        shutil.rmtree(cache)
        shutil.copytree(filled, cache)
        files = files_of(cache)
        assert len(files) > 5
        for path in files:
            if kind == "emptied":
                path.write_bytes(b"")
            else:
                damage(path, kind, rng)
        assert_trees_equal(run(kind), expected)
