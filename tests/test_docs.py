"""README and docs: every link resolves, every command and Python example is right.

Every command is checked for configs, keys and flags that exist. `RUN` says how each is run,
shortened where it takes long, and `NOT_RUN` why one is not; a new command in the documents
fails the test until it stands in one of them. The first two run always, all of them with
`-m slow`.
"""

import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from supcon_jax import pretrain
from supcon_jax.config.check import check_config
from supcon_jax.config.loading import load_config
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


# Command -> arguments that make it short. They run in this order, in one folder.
SHORT = "--config.total_steps=3 --config.log_every=1 --config.eval_every=0"
LINEAR = "--config.total_steps=3 --config.log_every=1"
CIFAR = f"{SHORT} --config.batch_size=16 --config.encoder.width=0.25"
TOY = (
    "--encoder resnet8 --image_size 16 --batch 16 --rounds 1 --steps 1 --dtype float32"
)
RUN = {
    "python main.py --config=configs/digits.py": SHORT,
    "python main.py --config=configs/linear_digits.py": "",
    "python main.py --config=configs/digits.py --config.profile_steps=20:25 "
    "--workdir=runs/profiled": "--config.total_steps=30 --config.eval_every=0",
    "python main.py --config=configs/evaluate_digits.py": "",
    "python -m supcon_jax.tools.predict runs/linear_digits FILE": "",
    "python -m supcon_jax.tools.embed runs/digits DIR --out=features.npz": "",
    "python -m supcon_jax.tools.export runs/linear_digits --out=exported": "",
    "python main.py --config=configs/digits.py --config.data.labelled_per_class=10 "
    "--workdir=runs/digits_10": SHORT,
    "python main.py --config=configs/finetune_digits.py": LINEAR,
    "python main.py --config=configs/finetune_digits.py:scratch": LINEAR,
    "python main.py --config=configs/evaluate_digits.py "
    "--config.pretrained=runs/finetune_digits": "--workdir=runs/evaluate_finetuned",
    "python -m supcon_jax.tools.report runs/digits runs/linear_digits "
    "runs/evaluate_digits": "",
    "python -m supcon_jax.tools.gradients runs/digits": "--images=16",
    "python -m supcon_jax.tools.embeddings runs/digits": "",
    "python -m supcon_jax.tools.embeddings runs/digits --ood=synthetic  "
    "--classifier=runs/linear_digits": "",
    "python -m supcon_jax.tools.corrupt --config=configs/digits.py --out=runs/digits_c": (
        "--severities=3"
    ),
    "python main.py --config=configs/robustness_digits.py": "",
    "python main.py --config=configs/evaluate_digits.py --workdir=runs/fog_3  "
    "--config.data.name=corrupted --config.data.root=runs/digits_c "
    "--config.data.eval_split=fog_3": "",
    "python main.py --config=configs/cross_entropy_digits.py": SHORT,
    "python main.py --config=configs/robustness_digits.py  "
    "--config.pretrained=runs/cross_entropy_digits --workdir=runs/robustness_baseline": "",
    "python main.py --config=configs/robustness_digits.py  "
    "--config.robustness.reference=runs/robustness_baseline": "",
    "python main.py --config=configs/digits.py --config.seed=$seed  "
    "--workdir=runs/digits_seed$seed": SHORT,
    "python main.py --config=configs/linear_digits.py --config.seed=$seed  "
    "--config.pretrained=runs/digits_seed$seed "
    "--workdir=runs/linear_digits_seed$seed": "",
    "python -m supcon_jax.tools.seeds runs/digits_seed*": "",
    "python -m supcon_jax.tools.seeds runs/linear_digits_seed* "
    "--out=runs/linear_digits.json": "",
    "python -m supcon_jax.tools.show_batch --config=FILE --out=batch.png": "",
    "python main.py --config=configs/supcon_cifar10.py --config.data.dir=DIR": CIFAR,
    "python main.py --config=configs/linear_cifar10.py --config.data.dir=DIR": (
        "--config.encoder.width=0.25"
    ),
    "python main.py --config=configs/linear_cifar10.py:sgd --config.data.dir=DIR": (
        f"{LINEAR} --config.batch_size=16 --config.encoder.width=0.25"
    ),
    "python main.py --config=configs/supcon_cifar10.py $F": (
        f"{CIFAR} --workdir=runs/40_epochs"
    ),
    "python main.py --config=configs/cross_entropy_cifar10.py $F": CIFAR,
    "python main.py --config=configs/supcon_r50.py --config.data.dir=DIR "
    "--config.batch_size=8 --config.total_steps=3": "--config.encoder.width=0.25",
    "python -m supcon_jax.tools.study studies/temperature.py --dry_run": "",
    "python -m benchmarks.digits --seeds=5": "--seeds=1",
    "python -m benchmarks.cifar10 --minutes=25": "--toy --seeds=1 --data_dir=DIR",
    "python -m benchmarks.input --data_dir=DIR --cifar": "--rounds=1",
    "python -m benchmarks.input --data_dir=DIR --policies": "--rounds=1",
    "python -m benchmarks.features --data_dir=DIR": "--rounds=1 --images=500",
    "python -m benchmarks.reading": "--batch=65536",
    "python -m benchmarks.reading --data_dir=DIR": (
        "--hosts=0 --records=512 --read_batch=64 --rounds=1"
    ),
    "python -m benchmarks.chaos": "--faults=damage --trials=1",
    "python -m benchmarks.chaos --faults=kill --trials=100": "--trials=1",
    "python -m benchmarks.chaos --faults=preempt,rot --trials=24": "--trials=0",
    "python -m benchmarks.chaos --faults=damage --trials=230": "--trials=1",
    "python -m benchmarks.safety --rounds 60": "--rounds 1 --encoder resnet8",
    "python -m benchmarks.safety --devices=8 --rounds=3": "--encoder resnet8",
    "python -m benchmarks.loss": "--sizes 64 --rounds 1",
    "python -m benchmarks.loss --accuracy": "--sizes 64",
    "python -m benchmarks.loss --options --sizes 512,2048 --no-memory": (
        "--sizes 64 --rounds 1"
    ),
    "python -m benchmarks.train_step": TOY,
    "python -m benchmarks.train_step --collectives --encoder resnet50 --image_size 32 "
    "--batch 16": TOY,
    "python -m benchmarks.train_step --loss_share": TOY,
    "python -m benchmarks.train_step --overlap": TOY,
}
# The same commands with sizes that are larger.
for size in ("128,256,512,1024,2048,4096,8192,16384", "16384", "8192,32768,131072"):
    RUN[f"python -m benchmarks.loss --sizes {size}"] = "--sizes 64 --rounds 1"
for size in (
    "224 --batch 1024 --dtype bfloat16 --microbatches 4",
    "224 --batch 256 --dtype bfloat16",
    "64 --batch 16 --rounds 5 --steps 2",
):
    RUN[f"python -m benchmarks.train_step --encoder resnet50 --image_size {size}"] = TOY
RUN[
    "python -m benchmarks.train_step --overlap --encoder resnet50 --image_size 224 "
    "--batch 256 --dtype bfloat16"
] = TOY
NOT_RUN = {
    "python -m benchmarks.train_step --large": "many minutes, whatever its flags",
    "python -m pytest": "the tests themselves",
    "python -m pytest -m aot": "the tests themselves",
    "python -m pytest -m slow": "the tests themselves",
    "python -m pytest -m slow tests/test_weights.py -k exported_run": (
        "the tests themselves"
    ),
    "python -m pytest -m slow tests/test_jobs.py": "the tests themselves",
    "python -m pytest -m slow -s tests/test_jobs.py -k cuts_it_off": (
        "the tests themselves"
    ),
    "python -m pytest -m slow -s tests/test_long_runs.py": "the tests themselves",
    "python -m pytest -m slow tests/test_page.py": "the tests themselves",
    "python -m pytest -m slow -s tests/test_topologies.py": "the tests themselves",
    "python -m pytest tests/test_hosts.py tests/test_jobs.py": "the tests themselves",
    "python -m supcon_jax.tools.show_batch": "no command, the tool's name",
    "python -m supcon_jax.tools.embeddings WORKDIR": "run on runs/digits",
    "python -m supcon_jax.tools.embeddings WORKDIR --ood=DATA": "run on runs/digits",
    "python -m supcon_jax.tools.plan --config=configs/supcon_r50.py "
    "--topology=v5e:16x16 --config.batch_size=8192": "libtpu; tests/test_forecast.py",
    "python -m supcon_jax.tools.plan --config=configs/supcon_r50.py "
    "--topology=v5e:16x16 --config.batch_size=8192 --host_rate=2000 --host_cores=112": (
        "libtpu; tests/test_forecast.py"
    ),
    "python -m pytest -m slow -n 0 -s tests/test_buckets.py": "the tests themselves",
    "python -m pytest tests/test_buckets.py tests/test_lock.py": "the tests themselves",
    "python -m supcon_jax.tools.index --config=configs/supcon_r50.py "
    "--config.data.dir=DIR": "writes beside the data; run in test_index.py",
    "python -m supcon_jax.tools.study studies/temperature.py": (
        "ten minutes; tests/test_study_runs.py runs a shorter one"
    ),
    "python -m supcon_jax.tools.study studies/temperature.py --scale=full "
    "--config.data.dir=DIR --dry_run": "needs ImageNet; tests/test_study.py checks it",
    "python -m venv .venv": "not ours",
    "python main.py --config=configs/transfer.py:food101 --config.data.dir=DIR": (
        "ResNet-50 on data that are not here; tests/test_finetune.py"
    ),
    "python main.py --config=configs/transfer.py:food101 --config.mode=linear_eval  "
    "--config.data.dir=DIR --workdir=runs/linear_food101": (
        "ResNet-50 on data that are not here; tests/test_finetune.py"
    ),
    "python main.py --config=configs/transfer.py:aircraft --config.data.root=DIR": (
        "ResNet-50 on data that are not here; tests/test_finetune.py"
    ),
    "python main.py --config=configs/supcon_cifar10.py:pytorch": "downloads CIFAR-10",
    "python -m supcon_jax.tools.study studies/wins.py": (
        "220 jobs; tests/test_study.py checks every study file, test_study_runs.py runs a small one"
    ),
    "python main.py --config=configs/supcon_folder.py:multilabel "
    "--config.data.root=DIR": "needs a labels.csv; tests/test_multilabel.py",
    "python main.py --config=configs/linear_folder.py:multilabel "
    "--config.data.root=DIR": "needs a labels.csv; tests/test_multilabel.py",
    "python main.py --config=configs/linear_vit_s.py --config.data.dir=DIR  "
    "--config.pretrained= --config.encoder.init_from=FILE": (
        "needs weights; tests/test_weights.py"
    ),
    "python main.py --config=configs/supcon_vit_s.py:imported --config.data.dir=DIR  "
    "--config.encoder.init_from=FILE": "needs weights; tests/test_weights.py",
    "python main.py --config=configs/transfer.py:oxford_iiit_pet --config.data.dir=DIR  "
    "--config.pretrained= --config.encoder.init_from=FILE  "
    "--config.encoder.convention=torchvision  "
    "'--config.data.mean=(0.485, 0.456, 0.406)' "
    "'--config.data.std=(0.229, 0.224, 0.225)'": "needs weights; tests/test_weights.py",
    "python -m pytest -m slow -n 0 -s tests/test_weights.py": "the tests themselves",
    "python -m tests.torch_weights": "needs torch and timm",
    "python -m supcon_jax.tools.corrupt": "no command, the tool's name",
    "python main.py --config=configs/robustness_r50.py --config.data.dir=DIR  "
    "--config.robustness.data=DIR/imagenet-c": "needs ImageNet-C",
    **{
        f"python main.py --config=configs/{name}_folder.py --config.data.root=DIR{rest}": (
            "photos of your own; tests/test_defaults.py goes this way"
        )
        for name, rest in (
            ("supcon", ""),
            ("linear", ""),
            ("evaluate", ""),
            (
                "evaluate",
                "  --config.data.eval_split=test --workdir=runs/evaluate_test",
            ),
        )
    },
    "python main.py --config=configs/supcon_r50.py --config.data.dir=DIR": (
        "for a pod; the same with three steps is run"
    ),
    "python main.py --config=configs/supcon_r50.py --config.data.dir=gs://BUCKET/tfds  "
    "--workdir=gs://BUCKET/runs/r50": "for a pod; tests/test_buckets.py runs the digits",
}


def test_every_command_is_run_or_says_why_not():
    assert set(ALL) == set(RUN) | set(NOT_RUN)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a user has after `git clone`, to run commands in."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("main.py", "configs", "supcon_jax", "benchmarks", "studies", "tests"):
        (folder / part).symlink_to(ROOT / part)
    return folder


def run_documented(command, folder):
    """Runs a command as a user would, the short way; what it printed, without warnings."""
    data = ROOT.parent / "shared/data/tfds"
    if ("DIR" in command or "$F" in command) and not data.is_dir():
        pytest.skip("needs ../shared (real data), which is not here")
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "F": f"--config.data.dir={data}",
    }
    line = f"{command} {RUN[command]}".replace("=DIR", f"={data}")
    line = line.replace("=FILE", "=configs/digits.py")
    # Images of any kind: those of the documents.
    line = line.replace(" FILE", f" {ROOT}/docs/report.png")
    line = line.replace(" DIR ", f" {ROOT}/docs ")
    if "$seed" in line:
        line = f"for seed in 0 1; do {line} || exit; done"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert "warning" not in done.stderr.lower(), f"{line}\n{done.stderr}"
    return done


@pytest.mark.parametrize("command", list(RUN)[:2], ids=str)
def test_the_first_commands_of_the_readme_run(command, clone):
    done = run_documented(command, clone)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", list(RUN)[2:], ids=str)
def test_each_command_runs(command, clone):
    """All of them in this order: later ones take the runs of earlier ones."""
    done = run_documented(command, clone)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"


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
    config = pretrain_config(
        **{"encoder.name": "resnet8", "total_steps": 1, "knn.bank": 0}
    )
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
