"""Imports run one way, and heavy packages are imported only where they are used."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "supcon_jax"

# Longest prefix wins. A module may import its own layer and those below.
LAYERS = {
    "supcon_jax": 0,
    "supcon_jax.losses": 0,
    "supcon_jax.models": 0,
    "supcon_jax.optimizers": 0,
    "supcon_jax.evaluation": 0,
    "supcon_jax.metrics": 0,
    "supcon_jax.planning": 0,
    "supcon_jax.data": 1,
    "supcon_jax.parallel": 1,
    "supcon_jax.planning.topologies": 1,
    "supcon_jax.planning.roofline": 1,
    "supcon_jax.weights": 1,
    "supcon_jax.storage": 1,
    "supcon_jax.storage.lock": 1,
    "supcon_jax.storage.epaths": 1,
    "supcon_jax.storage.mirror": 1,
    "supcon_jax.hosts": 1,
    "supcon_jax.logs": 1,
    "supcon_jax.cli": 1,
    "supcon_jax.config.files": 1,
    "supcon_jax.run.stop": 1,
    "supcon_jax.run.goodput": 1,
    "supcon_jax.run.health": 1,
    "supcon_jax.profiling": 1,
    "supcon_jax.steps": 2,
    "supcon_jax.checkpoint": 2,
    "supcon_jax.writers": 2,
    "supcon_jax.figures": 2,
    "supcon_jax.evaluation.predict": 2,
    "supcon_jax.config": 3,
    "supcon_jax.run": 3,
    "supcon_jax.pretrained": 3,
    "supcon_jax.inference": 3,
    "supcon_jax.tools": 3,
    "supcon_jax.objectives": 3,
    "supcon_jax.builders": 3,
    "supcon_jax.planning.forecast": 3,
    "supcon_jax.pretrain": 3,
    "supcon_jax.linear_eval": 3,
    "supcon_jax.evaluate": 3,
    "supcon_jax.finetune": 3,
    "supcon_jax.robustness": 3,
    "supcon_jax.evaluation.robustness_table": 2,
    "supcon_jax.study": 3,
    "supcon_jax.page": 3,
    "supcon_jax.page.charts": 0,
    "supcon_jax.__main__": 4,
}
PROGRAM = "supcon_jax.__main__"  # the only place with flags
L0_PACKAGES = {"jax", "flax", "optax", "numpy", "scipy"}
HEAVY = {
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "matplotlib",
    "sklearn",
    "tensorstore",
    "tensorboardX",
    "wandb",
    "trackio",
    "pyarrow",
    "jax2onnx",
    "onnxruntime",
}


# They are TensorFlow from end to end; others import them inside functions alone.
TENSORFLOW_MODULES = {
    "supcon_jax.data.autoaugment",
    "supcon_jax.data.host",
    "supcon_jax.data.host_color",
    "supcon_jax.data.host_views",
    "supcon_jax.data.host_operations",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def layer(module):
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        prefix = ".".join(parts[:length])
        if prefix in LAYERS:
            return LAYERS[prefix]
    return LAYERS["supcon_jax"] if module == "supcon_jax" else None


def imports(path, *, inside_functions):
    """Dotted names that a file imports; `from a import b` is a.b where a module."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    found.add(full if full in MODULES else child.module)
            elif (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                and not inside_functions
            ):
                continue
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_every_module_has_a_layer():
    """A new module is entered in LAYERS, next to the design's picture."""
    assert MODULES
    assert [name for name in MODULES if layer(name) is None] == []
    assert [name for name in LAYERS if name not in MODULES] == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    own = {
        module
        for module in imports(MODULES[name], inside_functions=True)
        if module.split(".")[0] == "supcon_jax"
    }
    upwards = [module for module in own if layer(module) > layer(name)]
    assert upwards == []


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) == 0])
def test_the_lowest_layer_knows_arrays_only(name):
    top = {m.split(".")[0] for m in imports(MODULES[name], inside_functions=True)}
    foreign = top - set(sys.stdlib_module_names) - {"supcon_jax"}
    assert foreign <= L0_PACKAGES
    assert not top & {"pathlib", "os", "argparse"}  # no files, no flags


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) < 3])
def test_configs_stop_at_the_loops(name):
    found = imports(MODULES[name], inside_functions=True)
    assert not {m for m in found if m.split(".")[0] in ("ml_collections", "configs")}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_parses_flags_or_loads_heavy_packages(name):
    at_import = imports(MODULES[name], inside_functions=False)
    heavy = {m for m in at_import if m.split(".")[0] in HEAVY}
    assert heavy == ({"tensorflow"} if name in TENSORFLOW_MODULES else set())
    assert name in TENSORFLOW_MODULES or not at_import & TENSORFLOW_MODULES
    everywhere = imports(MODULES[name], inside_functions=True)
    assert "absl.flags" not in everywhere
    source = MODULES[name].read_text()
    assert ("from absl import app, flags" in source) == (name == PROGRAM)
    if name != PROGRAM:
        assert "from absl import flags" not in source
        assert "from absl import app" not in source


@pytest.mark.parametrize(
    ("package", "only"),
    [
        (
            "tensorflow",
            {
                *TENSORFLOW_MODULES,
                "supcon_jax.data.records",
                "supcon_jax.data.tensorflow_imports",
            },
        ),
        ("tensorflow_datasets", {"supcon_jax.data.tensorflow_imports"}),
        (
            "orbax",
            {
                f"supcon_jax.checkpoint.{name}"
                for name in ("items", "manager", "restore")
            },
        ),
        ("tensorstore", {"supcon_jax.storage.files"}),
        ("gcsfs", {"supcon_jax.storage.epaths"}),
        ("tensorboardX", {"supcon_jax.writers"}),
        ("wandb", {"supcon_jax.writers"}),
        ("pyarrow", {"supcon_jax.tools.embed"}),
        ("jax2onnx", {"supcon_jax.inference.export"}),
        ("onnxruntime", {"supcon_jax.inference.export"}),
        ("trackio", {"supcon_jax.writers"}),
        ("matplotlib", {"supcon_jax.tools.show_batch", "supcon_jax.figures"}),
    ],
)
def test_each_package_is_known_to_few_files(package, only):
    users = {
        name
        for name, path in MODULES.items()
        for module in imports(path, inside_functions=True)
        if module.split(".")[0] == package
    }
    assert users == only


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_import_configs_only(path):
    top = {m.split(".")[0] for m in imports(path, inside_functions=True)}
    assert top <= {"ml_collections", "configs"}


def loaded_by(statements):
    """Top-level packages in a fresh interpreter after some imports."""
    script = f"{statements}; import sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in result.stdout.split()}


def test_the_loss_alone_is_light():
    loaded = loaded_by("import supcon_jax; supcon_jax.supcon_loss")
    assert "jax" in loaded
    assert not loaded & {*HEAVY, "absl", "ml_collections", "orbax"}


def test_the_loops_import_no_tensorflow():
    loaded = loaded_by(
        "import supcon_jax.pretrain, supcon_jax.linear_eval; supcon_jax.load_model"
    )
    assert "orbax" in loaded
    assert not loaded & {"tensorflow", "tensorflow_datasets", "torch"}
