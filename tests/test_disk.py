"""A full disk: one line, exit code 1, the last good checkpoint whole, and the run goes on."""

import re
import subprocess

import pytest

from supcon_jax.checkpoint import restore_encoder, saved_steps
from tests.faults import commands
from tests.processes import Job, flags, main_job

SAVES = {"total_steps": 40, "checkpoint_every": 8}


def ends_with(job, *says):
    """One line says it all, and every process has it."""
    assert set(job.wait(400).values()) == {1}, job[0].err
    for rank in job.processes:
        (line,) = job[rank].errors
        assert all(words in line for words in says), line
        assert not re.search("Traceback|Exception", job[rank].err), job[rank].err
        others = [x for x in job[rank].err.splitlines() if not x.startswith("FAULT")]
        assert others[-1] == line


def goes_on(workdir, size=1, **changes):
    """The last good checkpoint is whole; with room the same command ends, at its last step."""
    step = saved_steps(workdir)[-1]
    restore_encoder(workdir, step=step)
    with main_job(size, workdir, **changes) as job:
        assert set(job.wait(400).values()) == {0}, job[0].err
        assert f"resumed at step {step}\n" in job[0].out
    return saved_steps(workdir)[-1]


def test_a_save_that_finds_no_room(tmp_path):
    """The limit on the size of a file is the shell's `ulimit -f`."""
    changes = SAVES | {"log_every": 100, "writers": "('tensorboard',)"}
    fault = {0: "full@^saving step 24$"}
    with Job(commands(1, flags(tmp_path, **changes), fault)) as job:
        ends_with(job, "/checkpoints: a checkpoint cannot be written", " is whole")
    # The save of step 16 may not have been through when the room was gone.
    assert saved_steps(tmp_path)[-1] in (8, 16)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_save_that_finds_no_room_can_be_made_later(tmp_path, size):
    changes = SAVES | {"log_every": 100}
    faults = {rank: "full@^saving step 24$" for rank in range(size)}
    with Job(commands(size, flags(tmp_path, **changes), faults)) as job:
        ends_with(job, "a checkpoint cannot be written")
    assert goes_on(tmp_path, size, **changes) == changes["total_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("writers", ["()", "('tensorboard',)"])
def test_a_line_of_metrics_that_finds_no_room(tmp_path, writers):
    # No save may be under way then: it would find no room first.
    changes = SAVES | {"log_every": 1, "writers": writers, "checkpoint_every": 0}
    with Job(commands(1, flags(tmp_path, **changes), {0: "terminate@^step 5$"})) as job:
        assert job.wait(400) == {0: 0}, job[0].err
    fault = {0: "full@^step 21$"}
    with Job(commands(1, flags(tmp_path, **changes), fault)) as job:
        ends_with(job, "metrics.jsonl: File too large")
    assert goes_on(tmp_path, **changes) == changes["total_steps"]


@pytest.mark.slow
def test_a_small_disk_that_fills_up(tmp_path):
    """Really no space left: a file system of 400 kB in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    changes = SAVES | {"log_every": 100, "keep_checkpoints": 30}
    changes |= {"total_steps": 200}
    try:
        with main_job(1, tmp_path / "run", **changes) as job:
            ends_with(job, "cannot be written", "No space left on device", "is whole")
        larger = ["mount", "-o", "remount,size=40m", str(tmp_path)]
        subprocess.run(larger, check=True)
        assert goes_on(tmp_path / "run", **changes) == changes["total_steps"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
