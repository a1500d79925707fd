"""Compiling for TPU chips that need not be there (`pip install "jax[tpu]"`)."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Of a 2x4 slice of v5e.
MESH = """
import jax, numpy as np
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = jax.sharding.Mesh(np.array(topology.devices), ("data",))
"""


def compiled_for_tpu(program: str) -> str:
    """What a program, which has a `mesh` of eight chips, prints after "found"."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    # Tests spare themselves optimisations that this is about.
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", MESH + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = re.findall(r"found (.*)", done.stdout)
    return found
