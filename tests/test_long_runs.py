"""Thousands of steps: memory does not grow, and nothing is compiled again."""

import re

import numpy as np
import pytest

from tests.processes import Job, flags
from tests.test_jobs import WRAPPED

# Resident memory every hundred steps, and the names of all that is compiled.
WATCHED = """
import os, jax
from supcon_jax import hosts
jax.config.update("jax_log_compiles", True)
real, page = hosts.beat, os.sysconf("SC_PAGE_SIZE")
def beat(doing, patience=1.0):
    if doing.startswith("step ") and doing.endswith("00"):
        with open("/proc/self/statm") as file:
            print("MEMORY", doing[5:], int(file.read().split()[1]) * page, flush=True)
    real(doing, patience)
hosts.beat = beat
"""


@pytest.mark.slow
@pytest.mark.parametrize("epoch", ["long", "short"])
def test_memory_does_not_grow_and_one_step_is_compiled(tmp_path, epoch):
    """With evaluations, saves and, in the second run, 200 epochs."""
    arguments = flags(
        tmp_path,
        total_steps=4000,
        log_every=50,
        eval_every=500,
        checkpoint_every=250,
        writers="('tensorboard',)",
        data__fraction=0.25 if epoch == "short" else 1.0,
    )
    with Job([["-c", WRAPPED.format(before=WATCHED), *arguments]]) as job:
        assert job.wait(1500) == {0: 0}, job[0].err
    compiled = re.findall(r"Finished XLA compilation of (\S+)", job[0].err)
    assert compiled.count("jit(train_step)") == 1, compiled
    read = re.findall(r"^MEMORY (\d+) (\d+)", job[0].out, re.M)
    steps, memory = np.array(read, np.float64).T
    later = steps > 1500  # buffers and caches are filled
    slope = np.polyfit(steps[later] / 1000, memory[later] / 1e6, 1)[0]
    print(
        f"{epoch}: {slope:.2f} MB per 1,000 steps, {memory[-1] / 1e6:.0f} MB at the end"
    )
    assert slope < 1
