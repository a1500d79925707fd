"""Three training steps, each from a given state; a program for tests/test_jobs.py.

    python tests/steps_of_a_job.py WORKDIR FILE

Without FILE.npz it makes the states and keeps them there; with it, it begins every step
with the kept state before it and says how far the state after it is away.
"""

import pathlib
import sys

import jax
import numpy as np

from supcon_jax import hosts, parallel
from supcon_jax.cli import one_line_errors
from supcon_jax.run.opening import open_run
from tests.runs import first_batches, pretrain_config

STEPS = 3


def main(workdir, file):
    hosts.initialize()
    config = pretrain_config(compilation_cache=False)
    run = open_run(config, workdir)
    compiled, seed = run.plan.lower().compile(), run.plan.seed_on_devices()
    replicated = parallel.replicated(run.mesh)
    batches = parallel.prefetch_to_devices(first_batches(run), run.mesh)
    kept = dict(np.load(file)) if file.exists() else {}
    making, worst = not kept, 0.0
    state = jax.jit(run.plan.init, out_shardings=replicated)()
    structure = jax.tree.structure(state)

    def leaves(state):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def keep(number, state):
        for place, leaf in enumerate(leaves(state)):
            kept[f"{number}/{place}"] = leaf.copy()

    def known(number):
        return [kept[f"{number}/{place}"] for place in range(structure.num_leaves)]

    if making:
        keep(0, state)
    for number in range(STEPS):
        state = jax.device_put(jax.tree.unflatten(structure, known(number)), replicated)
        state, metrics = compiled(seed, state, next(batches))
        ours = [*leaves(state), np.asarray(metrics["train/loss"])]
        if making:
            keep(number + 1, state)
            kept[f"loss/{number}"] = ours[-1]
        for a, b in zip(
            ours, [*known(number + 1), kept[f"loss/{number}"]], strict=True
        ):
            scale = float(np.max(np.abs(b), initial=0)) or 1.0
            distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
            worst = max(worst, float(np.max(distance, initial=0)) / scale)
    if making:
        np.savez(file, **kept)
    print(f"processes {hosts.count()}, devices {run.mesh.size}, relative {worst:.3g}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1], pathlib.Path(sys.argv[2]))
