"""Other numbers of devices and processes than those that saved: the same examples in the
same order, and nearly the same losses.
"""

import re

import numpy as np
import pytest

from tests.processes import Job, flags
from tests.test_jobs import WRAPPED, metrics

# Digests of the images of every batch that this process feeds, and a fault.
RECORDED = """
import hashlib
from supcon_jax import parallel
from tests import faults
real = parallel.prefetch_to_devices
def prefetch_to_devices(batches, *arguments):
    def told():
        for batch in batches:
            rows = [hashlib.sha256(x.tobytes()).hexdigest()[:8] for x in batch["image"]]
            print("ROWS", *rows, flush=True)
            yield batch
    return real(told(), *arguments)
parallel.prefetch_to_devices = prefetch_to_devices
if {fault!r}:
    faults.inject({fault!r})
"""
STEPS = 24


def run_stage(workdir, processes, devices, fault):
    """The examples of each step from the first that it makes, and that one's number."""
    before = RECORDED.format(fault=fault)
    # A learning rate at which the network moves, and rounding grows.
    arguments = flags(workdir, total_steps=STEPS, checkpoint_every=8, log_every=1)
    with Job(
        [["-c", WRAPPED.format(before=before), *arguments]] * processes, devices=devices
    ) as job:
        codes = job.wait(500)
        assert set(codes.values()) == {0}, (job[0].out, job[0].err)
        resumed = re.search(r"resumed at step (\d+)", job[0].out)
        rows = [
            [line.split()[1:] for line in re.findall("^ROWS .*", job[rank].out, re.M)]
            for rank in range(processes)
        ]
    first = int(resumed[1]) + 1 if resumed else 1
    batches = min(map(len, rows))
    # In the order of the processes they are the rows of the whole batch.
    return first, [sum((own[step] for own in rows), []) for step in range(batches)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", [((1, 8), (1, 4), (1, 1)), ((2, 1), (1, 1), (2, 1))], ids=str
)
def test_other_topologies_go_on_with_the_same_examples(tmp_path, stages):
    """Preempted at steps 8 and 16 or a little later."""
    _, whole = run_stage(tmp_path / "whole", *stages[0], "")
    faults = ["terminate@^step 8$", "terminate@^step 16$", ""]
    starts = []
    for (processes, devices), fault in zip(stages, faults, strict=True):
        first, examples = run_stage(tmp_path / "run", processes, devices, fault)
        last = min(len(whole), first - 1 + len(examples))
        assert examples[: last - first + 1] == whole[first - 1 : last]
        starts.append(first)
    assert starts[0] == 1 and 8 < starts[1] < starts[2] <= STEPS
    ours, theirs = (
        np.array([record["train/loss"] for record in metrics(tmp_path / name)])
        for name in ("run", "whole")
    )
    assert len(ours) == len(theirs) == STEPS
    apart = np.abs(ours - theirs) / theirs
    print(f"{stages}, started at {starts}: losses apart by {apart.max():.2g}")
    # Until the first change they are the same steps of the same program.
    assert np.all(apart[: starts[1] - 1] == 0)
    assert 0 < apart.max() < 1e-4
