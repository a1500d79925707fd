"""README and docs: every link resolves, every command and Python example is right.

`COMMANDS` says for every command of main.py in the documents what is tried of it. A new
command in the documents fails the test until it stands here.
"""

import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from supcon_jax import pretrain
from supcon_jax.config import check_config
from supcon_jax.tools.show_batch import load_config
from tests.runs import pretrain_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# What stands for a user's own folder, file or seed in a command.
PLACES = ("DIR", "FILE", "$seed", "$F", "STEPS")


def commands(text):
    """Every command that begins with "python", from bash blocks and from inline code."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        block = re.sub(r"\\\n\s*", " ", block)
        for line in block.splitlines():
            line = line.split("  #")[0].split(" # ")[0]
            found += [part.strip() for part in re.split(r"&&|;| do ", line)]
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", without_blocks):
        found.append(re.sub(r"\\?\s*\n\s*", " ", span).strip())
    return sorted({c for c in found if c.startswith("python ")})


ALL = sorted({c for document in DOCUMENTS for c in commands(document.read_text())})
MAIN = [c for c in ALL if c.startswith("python main.py ")]
MODULES = [c for c in ALL if c.startswith("python -m ") and " pytest" not in c]


def test_the_documents_have_commands():
    """So that a change of layout does not empty the tests below."""
    assert len(MAIN) > 10 and len(MODULES) > 10


@pytest.mark.parametrize("command", MAIN)
def test_main_commands_name_configs_and_keys_that_exist(command):
    config, *rest = (
        argument for argument in shlex.split(command)[2:] if argument not in PLACES
    )
    name = config.removeprefix("--config=")
    if name == "FILE:VARIANT" or name in PLACES:
        return
    changes = [
        argument.removeprefix("--config.")
        for argument in rest
        if argument.startswith("--config.")
        and not any(place in argument for place in PLACES)
    ]
    others = [a for a in rest if not a.startswith("--config.")]
    assert all(a.startswith("--workdir=") or a == "..." for a in others), others
    check_config(load_config(str(ROOT / name), changes))


@functools.cache
def help_of(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", MODULES)
def test_module_commands_have_flags_that_exist(command):
    module, *rest = shlex.split(command)[2:]
    assert importlib.util.find_spec(module), module
    flags = {a.partition("=")[0] for a in rest if a.startswith("--")}
    known = help_of(module) if flags - {"--help"} else ""
    for flag in flags:
        if not flag.startswith("--config."):
            assert re.search(rf"{flag}\b", known), (flag, command)


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def python_blocks(name):
    text = (ROOT / name).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_examples_of_the_readme(tmp_path, monkeypatch):
    """The loss alone, and the encoder of a run."""
    monkeypatch.chdir(tmp_path)
    config = pretrain_config(**{"encoder.width": 1.0, "total_steps": 1, "knn.bank": 0})
    pretrain.pretrain(config, "runs/digits")
    loss, encoder = python_blocks("README.md")
    rng = np.random.default_rng(0)
    names = {
        "projections": rng.normal(size=(4, 2, 8)).astype(np.float32),
        "labels": np.array([0, 0, 1, 1]),
        "images": rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
    }
    exec(loss, names)
    assert np.isfinite(names["loss"])
    exec(encoder, names)
    assert names["embeddings"].shape == (4, 64)


def test_examples_of_the_loss():
    """Alone, and in shard_map on a mesh as jax.make_mesh makes it: one value."""
    alone, sharded = python_blocks("docs/losses.md")
    rng = np.random.default_rng(0)
    names = {
        "projections": rng.normal(size=(16, 2, 8)).astype(np.float32),
        "labels": np.arange(16) % 4,
    }
    exec(alone, names)
    expected = float(names["loss"])
    exec(sharded, names)
    np.testing.assert_allclose(names["loss"], expected, rtol=1e-6)
