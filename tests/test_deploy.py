"""deploy/: what starts runs elsewhere says what the program and its docs say."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from supcon_jax.config.loading import load_config
from supcon_jax.planning.topologies import find_topology

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def check_arguments(arguments):
    """They name a config and keys that exist."""
    (config,) = [a for a in arguments if a.startswith("--config=")]
    changes = [a for a in arguments if a.startswith("--config.")]
    load_config(
        str(ROOT / config.removeprefix("--config=")),
        [a.removeprefix("--config.") for a in changes],
    )
    rest = [a for a in arguments if a != config and a not in changes]
    assert all(a.startswith("--workdir=") for a in rest), rest


# --- Slurm ---

STUB = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" "code=$SUPCON_STOPPED_CODE" >> "$STUB_LOG"
[ "$(basename "$0")" = scontrol ] || exit "$STUB_CODE"
"""


def sbatch(tmp_path, code, **variables):
    """Runs the script as Slurm does; its exit code, and what it called."""
    for name in ("srun", "scontrol"):
        stub = tmp_path / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", DEPLOY / "slurm.sbatch", "--config=FILE", "--workdir=a folder"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STUB_LOG": str(log),
            "STUB_CODE": str(code),
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_ON_NODE": "96",
            **variables,
        },
        capture_output=True,
        text=True,
    )
    return done.returncode, log.read_text().splitlines()


def test_sbatch_passes_its_arguments_on(tmp_path):
    code, called = sbatch(tmp_path, 0)
    assert code == 0
    assert called[0] == "srun" and "--cpus-per-task=96" in called
    place = called.index("python")
    assert called[place : place + 4] == [
        "python",
        "main.py",
        "--config=FILE",
        "--workdir=a folder",
    ]
    assert called[-1] == "code=75"  # nothing was queued again


@pytest.mark.parametrize("code", [1, 2, 137])
def test_sbatch_does_not_repeat_mistakes_and_faults(code, tmp_path):
    assert sbatch(tmp_path, code)[0] == code
    assert "scontrol" not in sbatch(tmp_path, code)[1]


def test_sbatch_queues_a_stopped_run_again(tmp_path):
    code, called = sbatch(tmp_path, 75, SLURM_RESTART_COUNT="3")
    assert code == 75
    place = called.index("scontrol")
    assert called[place : place + 3] == ["scontrol", "requeue", "17"]


def test_sbatch_does_not_go_on_for_ever(tmp_path):
    limits = {"SLURM_RESTART_COUNT": "5", "SUPCON_MAX_RESTARTS": "5"}
    code, called = sbatch(tmp_path, 75, **limits)
    assert code == 75 and "scontrol" not in called


def test_sbatch_options_stand_where_slurm_reads_them():
    """Before the first command; and the example in its header is a command of ours."""
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/bin/bash" and options and max(options) < first
    header = "\n".join(lines[:first])
    assert "--requeue" in header and "--signal=TERM@" in header
    example = re.sub(r"\\\n# +", "", header)
    (arguments,) = re.findall(r"deploy/slurm.sbatch (.*)", example)
    check_arguments(arguments.split())


# --- GKE ---


def test_jobset():
    """Hosts and chips are those of the slice; only code 75 starts it again."""
    (jobset,) = yaml.safe_load_all((DEPLOY / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    for policy in jobset["spec"]["failurePolicy"]["rules"]:
        # As JobSet's own schema asks.
        assert re.fullmatch(r"[A-Za-z]([\w,:]*\w)?", policy["name"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    kinds = {"tpu-v5-lite-podslice": "v5e"}
    selector = pod["nodeSelector"]
    topology = find_topology(
        f"{kinds[selector['cloud.google.com/gke-tpu-accelerator']]}:"
        f"{selector['cloud.google.com/gke-tpu-topology']}"
    )
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert chips == topology.chip.host_chips
    assert job["parallelism"] == job["completions"] == topology.num_hosts
    check_arguments(container["args"])
    # Kubernetes takes a policy for failed pods only with these.
    assert pod["restartPolicy"] == "Never" and job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert 75 not in rule["onExitCodes"]["values"]
    assert {1, 2} <= set(rule["onExitCodes"]["values"])
    assert {"name": "SUPCON_STOPPED_CODE", "value": "75"} in container["env"]


# --- Docker ---


def test_dockerfile(tmp_path):
    """What it copies is there and is all that the program needs to start."""
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) \S+$", text, re.M)
    assert {"requirements.txt", "main.py", "configs", "supcon_jax"} == set(copied)
    for name in copied:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    kept = re.findall(
        r"^!(\S+)", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M
    )
    assert {name.removesuffix("/**") for name in kept} == set(copied)
    assert "ENV SUPCON_STOPPED_CODE=75" in text
    (entry,) = re.findall(r'^ENTRYPOINT \["python", "(\S+)"\]$', text, re.M)
    done = subprocess.run(
        [sys.executable, entry, "--config=configs/digits.py", "--config.batch_size=0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--config.batch_size" in done.stderr
