"""The notebook runs from top to bottom, and its outputs are those of this code."""

import ast
import importlib
import json
import pathlib

import pytest

TOUR = pathlib.Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


def test_it_is_committed_with_its_outputs():
    cells = [
        c for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"
    ]
    assert all(cell["execution_count"] for cell in cells)
    assert sum("image/png" in str(cell["outputs"]) for cell in cells) == 2


def test_what_it_imports_is_there():
    cells = json.loads(TOUR.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    found = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)]
    ours = [n for n in found if n.module.startswith("supcon_jax")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name), (node.module, alias.name)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[docs]"')
    notebook = nbformat.read(TOUR, as_version=4)
    done = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    told = str([cell.get("outputs") for cell in done.cells])
    assert "-0.33" in told  # the corners of a tetrahedron
    assert told.count("'image/png'") == 2
