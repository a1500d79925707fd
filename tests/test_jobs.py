"""Jobs of several real processes: the same training, and one clear end for every fault."""

import json
import re
import signal
import time

import numpy as np
import pytest

from supcon_jax.checkpoint import saved_steps
from supcon_jax.data.datasets import open_source
from tests.faults import commands
from tests.processes import Job, Process, flags, main_job
from tests.runs import assert_trees_equal, write_corrupted

# main.py with something changed beforehand; its arguments follow.
WRAPPED = """
import runpy, sys
{before}
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""
# Every file below the workdir that this process writes, moves or deletes.
AUDITED = """
import atexit, json, os
workdir, touched = {workdir!r}, set()
def hook(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    if event == "open" and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and str(arguments[0]).startswith(workdir):
        touched.add(str(arguments[0]))
sys.addaudithook(hook)
atexit.register(lambda: print("TOUCHED", json.dumps(sorted(touched)), flush=True))
"""


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def computed(workdir):
    """What does not depend on the clock."""
    timed = ("wall_s", "train/images_per_sec", "goodput/")
    return [
        {k: v for k, v in record.items() if not k.startswith(timed)}
        for record in metrics(workdir)
    ]


def one_end(job, code, *says, ranks=(0, 1)):
    """Every process ends with the code and one line, which is the same for all."""
    lines = set()
    for rank in ranks:
        assert job[rank].code == code, job[rank].err
        assert len(job[rank].errors) == 1, job[rank].err
        assert "Traceback" not in job[rank].err and "Check failure" not in job[rank].err
        assert job[rank].err.splitlines()[-1] == job[rank].errors[0]
        lines.add(job[rank].errors[0])
    assert len(lines) == 1, lines
    for words in says:
        assert re.search(words, *lines), (words, lines)


# --- The same training ---


def run_both(tmp_path, size):
    """Workdirs of processes of one device each, and of one process with as many devices.

    The other processes than the first write none of the shared files.
    """
    several, one = tmp_path / "several", tmp_path / "one"
    before = AUDITED.format(workdir=str(several))
    audited = [["main.py", *flags(several)]] + [
        ["-c", WRAPPED.format(before=before), *flags(several)] for _ in range(1, size)
    ]
    with Job(audited) as job, main_job(1, one, devices=size) as alone:
        assert set(job.wait().values()) == {0}, job[0].err
        assert alone.wait() == {0: 0}, alone[0].err
        for rank in range(1, size):
            (line,) = re.findall(r"^TOUCHED (.*)", job[rank].out, re.M)
            # The files of metrics, log, config and figures are those of process 0.
            assert [p for p in json.loads(line) if "/checkpoints" not in p] == []
    assert [record["step"] for record in metrics(several)] == list(range(1, 13))
    assert not list(several.glob(".seen-by-all*"))
    return several, one


def test_two_processes_equal_two_devices_bit_for_bit(tmp_path):
    from supcon_jax.checkpoint import restore_encoder

    several, one = run_both(tmp_path, 2)
    assert computed(several) == computed(one)
    assert_trees_equal(restore_encoder(several), restore_encoder(one))


@pytest.mark.slow
def test_four_processes_train_as_four_devices(tmp_path):
    """Not to the bit: a sum of four depends on its order, and the network has its own."""
    several, one = run_both(tmp_path, 4)
    ours, theirs = metrics(several)[0], metrics(one)[0]
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_each_step_from_one_state_equals_a_single_process(tmp_path, size):
    """Steps, not runs: rounding grows from step to step, whatever makes it."""
    file = tmp_path / "states.npz"
    command = ["-m", "tests.steps_of_a_job"]
    for processes in (1, size):
        with Job([[*command, tmp_path / "run", file]] * processes) as job:
            assert set(job.wait().values()) == {0}, job[0].err
            told = re.search(
                r"processes (\d), devices (\d), relative (\S+)", job[0].out
            )
            assert told[1] == told[2] == str(processes)
            assert float(told[3]) <= 1e-5
            assert (
                processes == 1 or float(told[3]) > 0
            )  # they were not one and the same


@pytest.mark.slow
def test_an_evaluation_by_two_processes_is_that_of_one(tmp_path):
    """Counts to the last image; logits to the rounding of other shapes."""
    model = {"loss.name": "cross_entropy", "knn.bank": 0}
    with main_job(1, tmp_path / "run", **model) as job:
        assert job.wait() == {0: 0}, job[0].err
    metrics, predictions = [], []
    for size in (1, 2):
        out = tmp_path / str(size)
        changes = {"mode": "evaluate", "pretrained": tmp_path / "run", **model}
        with main_job(size, out, **changes) as job:
            assert set(job.wait().values()) == {0}, job[0].err
        metrics.append(json.loads((out / "metrics.jsonl").read_text()))
        with np.load(out / "predictions.npz") as file:
            predictions.append(dict(file))
    one, two = metrics
    for name in ("eval/top1", "eval/top5", "eval/num_examples"):
        assert one[name] == two[name]
    for name in filter(lambda name: name.startswith("eval/"), one):
        assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-6), name
    for name in ("ids", "labels"):
        np.testing.assert_array_equal(predictions[0][name], predictions[1][name])
    np.testing.assert_allclose(
        predictions[0]["logits"], predictions[1]["logits"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_robustness_by_two_processes_is_that_of_one(tmp_path):
    """Every split of a dataset like CIFAR-10-C, its images darker with the severity."""
    model = {"loss.name": "cross_entropy", "knn.bank": 0}
    with main_job(1, tmp_path / "run", **model) as job:
        assert job.wait() == {0: 0}, job[0].err
    digits = open_source("digits", "test")
    corrupted = write_corrupted(
        tmp_path / "c",
        digits.images[:50],
        digits.labels[:50],
        lambda images, severity: images // severity,
    )
    found = []
    for size in (1, 2):
        out = tmp_path / f"robust_{size}"
        changes = {"mode": "robustness", "pretrained": tmp_path / "run", **model}
        changes["robustness.data"] = corrupted
        with main_job(size, out, **changes) as job:
            assert set(job.wait(300).values()) == {0}, job[0].err
        found.append(json.loads((out / "metrics.jsonl").read_text()))
    for name in filter(lambda name: name.startswith("robustness/"), found[0]):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


# --- Processes that differ ---


def test_another_seed_is_refused_by_name(tmp_path):
    with main_job(2, tmp_path / "run", seed=[0, 1]) as job:
        job.wait(60)
        one_end(job, 2, r"process 1 \(\S+\) has seed=1 where process 0 has 0")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_flags_of_one_process_ends_all(tmp_path):
    """It is found before the processes have joined."""
    arguments = flags(tmp_path / "run")
    with Job(
        [["main.py", *arguments], ["main.py", *arguments, "--config.sead=1"]]
    ) as job:
        job.wait(60)
        one_end(
            job,
            2,
            r"^error: process 1 \(\S+\): unknown config key 'sead'.*--config.seed",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workdirs_that_are_not_shared_are_refused(tmp_path):
    with main_job(2, [tmp_path / "a", tmp_path / "b"]) as job:
        job.wait(60)
        one_end(job, 2, r"process 1 \(\S+\) does not see .*--workdir")
    assert list(tmp_path.iterdir()) == []


def test_the_refusal_of_one_process_is_everybodys(tmp_path):
    """Its data are missing on one host only."""
    with main_job(
        2,
        tmp_path / "run",
        data__name="folder",
        data__eval_split="val",
        data__root=[folder_of_images(tmp_path / "images"), tmp_path / "missing"],
    ) as job:
        job.wait(60)
        one_end(job, 2, r"^error: process 1 \(\S+\): .*missing", "--config.data.root")
    assert not (tmp_path / "run").exists()


def folder_of_images(root):
    """Two classes of eight noise images, for both splits."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.slow
def test_other_code_is_refused(tmp_path):
    before = "from supcon_jax import hosts; hosts.code_version = lambda: 'older'"
    arguments = flags(tmp_path / "run")
    with Job(
        [["main.py", *arguments], ["-c", WRAPPED.format(before=before), *arguments]]
    ) as job:
        job.wait(60)
        one_end(job, 2, "process 1 .* the code=older where process 0 has jax")
    assert not saved_steps(tmp_path / "run")  # it was refused before it computed


@pytest.mark.slow
def test_other_data_are_refused(tmp_path):
    roots = [folder_of_images(tmp_path / name) for name in ("x", "y")]
    for root, copies in zip(roots, (1, 2), strict=True):
        for copy in range(copies):
            first = root / "train" / "a" / "0.png"
            (root / "train" / "a" / f"copy{copy}.png").write_bytes(first.read_bytes())
    with main_job(
        2,
        tmp_path / "run",
        data__name="folder",
        data__eval_split="val",
        data__root=roots,
    ) as job:
        job.wait(60)
        one_end(job, 2, "process 1 .* train=.*same data")
    assert not saved_steps(tmp_path / "run")


# --- A signal to one of them ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "1 terminate@^step 5$",
        "0 terminate@^step 5$",
        "0 interrupt@^step 5$",
        "1 interrupt@^step 5$",
        "1 terminate@^compiling$",
        "1 terminate@^saving step 20$",
        "0 terminate@images",
    ],
)
def test_a_signal_to_one_process_saves_and_ends_all(tmp_path, fault):
    """At the same step, with code 0; the same command goes on from there."""
    victim, fault = fault.split(" ", 1)
    changes = {"total_steps": 4000, "log_every": 20, "checkpoint_every": 20}
    if "images" in fault:
        changes["eval_every"] = 20
    arguments = flags(tmp_path, **changes)
    with Job(commands(2, arguments, {int(victim): fault})) as job:
        assert job.wait(300) == {0: 0, 1: 0}, (job[0].err, job[1].err)
        for rank in (0, 1):
            assert "Traceback" not in job[rank].err and job[rank].errors == []
        told = re.search(r"stopped; step (\d+) is saved; the same command", job[0].out)
        begun = re.search(r"FAULT \w+ ([\d.]+) at (.*)", job[int(victim)].err)
    step = int(told[1])
    assert saved_steps(tmp_path)[-1] == step
    assert max(record["step"] for record in metrics(tmp_path)) <= step < 4000
    assert begun is not None
    with main_job(2, tmp_path, **changes) as job:
        job.wait_for(rf"resumed at step {step}\b")
        job.wait_for(rf"step +{step + 1}/")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_in_an_evaluation_of_a_job_cuts_it_off(tmp_path, victim):
    """40,000 images take far longer than the seconds until both have ended."""
    changes = {
        "total_steps": 1000,
        "eval_every": 20,
        "data.fake": True,
        "data.image_size": 8,
        "knn.bank": 40000,
    }
    fault = {victim: "terminate@^kNN: training images$"}
    with Job(commands(2, flags(tmp_path, **changes), fault)) as job:
        job.wait_for("FAULT terminate", rank=victim)
        start = time.monotonic()
        assert job.wait(300) == {0: 0, 1: 0}, (job[0].err, job[1].err)
        seconds = time.monotonic() - start
        assert "step 20 is saved" in job[0].out and "evaluated in" not in job[0].out
    assert saved_steps(tmp_path) == [20]
    print(f"SIGTERM to process {victim} of 2 in an evaluation: {seconds:.1f} s")


# --- Dead, stuck and missing peers ---

LONG = {"total_steps": 1_000_000, "log_every": 20, "knn__bank": 0}


def check_kill(tmp_path, size, victim, number):
    """Seconds until all others have ended, each with one line and code 75."""
    with main_job(size, tmp_path / "run", **LONG) as job:
        job.wait_for(r"step +60/")
        start = time.monotonic()
        job[victim].send(number)
        others = [rank for rank in range(size) if rank != victim]
        for rank in others:
            job[rank].wait(45)
        seconds = time.monotonic() - start
        one_end(job, 75, rf"process {victim} \(", "goes on", ranks=others)
    print(f"{number.name} to process {victim} of {size}: {seconds:.1f} s")
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "victim", "number"),
    [
        (2, 0, signal.SIGKILL),
        (2, 1, signal.SIGKILL),
        (4, 0, signal.SIGKILL),
        (4, 2, signal.SIGKILL),
        (2, 0, signal.SIGSTOP),
        (2, 1, signal.SIGSTOP),
        (4, 3, signal.SIGSTOP),
    ],
    ids=str,
)
def test_a_dead_or_stopped_process_ends_the_others(tmp_path, size, victim, number):
    check_kill(tmp_path, size, victim, number)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("doing", ["step 5", "kNN: test images", "saving step 12"])
def test_a_stuck_process_ends_all_with_stacks(tmp_path, victim, doing):
    """It is alive, and so is its network: only the watchdog can tell."""
    arguments = flags(tmp_path / "run", hosts__watchdog_minutes=0.5)
    with Job(commands(2, arguments, {victim: f"stick@^{doing}$"})) as job:
        job.wait(150)
        for rank in (0, 1):
            assert job[rank].code == 75
            assert len(job[rank].errors) == 1
            assert "stuck: no step or batch for" in job[rank].errors[0]
            assert "hosts.watchdog_minutes" in job[rank].errors[0]
            assert re.search(
                r"process [01] \(\S+\) for \d+ s at: ", job[rank].errors[0]
            )
        assert "in stuck_here" in job[victim].err
        # The loop, wherever it waits: in a step, or for word of a peer after one failed.
        assert "supcon_jax/run/loop.py" in job[1 - victim].err
    assert "most recent call first" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_a_single_process_that_is_stuck_ends_too(tmp_path):
    arguments = flags(tmp_path / "run", hosts__watchdog_minutes=0.1)
    with Job(commands(1, arguments, {0: "stick@^step 5$"})) as job:
        job.wait(150)
        assert job[0].code == 75 and "in stuck_here" in job[0].err
        assert job[0].errors[0].startswith("error: stuck: no step")


WATCHED = """
import sys, time
from supcon_jax import hosts
with hosts.Watchdog({minutes}):
    for _ in range({beats}):
        hosts.beat("step", patience={patience})
        time.sleep({every_s})
print("through")
"""


@pytest.mark.parametrize(
    ("minutes", "beats", "every_s", "patience", "code"),
    [
        (0.01, 8, 0.2, 1, 0),  # steps within the limit of 0.6 s, for longer than it
        (0.01, 1, 3.0, 1, 75),
        (0.01, 1, 1.5, 6, 0),  # what may take longer
        (0.0, 1, 1.5, 1, 0),
    ],
)
def test_the_watchdog_ends_what_does_not_get_on(
    minutes, beats, every_s, patience, code
):
    values = dict(minutes=minutes, beats=beats, every_s=every_s, patience=patience)
    process = Process(["-c", WATCHED.format(**values)], {"JAX_PLATFORMS": "cpu"})
    assert process.wait(60) == code, process.err
    assert ("through" in process.out) == (code == 0)
    assert (
        bool(process.errors) == ("most recent call first" in process.err) == bool(code)
    )


@pytest.mark.slow
def test_a_stopped_and_continued_process_is_not_taken_for_stuck(tmp_path):
    """Ctrl-Z and fg: the clock went on, the process did not."""
    with main_job(1, tmp_path / "run", hosts__watchdog_minutes=0.2, **LONG) as job:
        job.wait_for(r"step +60/")
        job[0].send(signal.SIGSTOP)
        time.sleep(20)
        job[0].send(signal.SIGCONT)
        time.sleep(4)
        assert job[0].code is None, job[0].err


@pytest.mark.slow
def test_a_peer_that_never_comes_is_given_up(tmp_path):
    environs = [{"SUPCON_JOIN_TIMEOUT_S": "20"}] * 4
    with main_job(4, tmp_path / "run", environs=environs, missing=(2,)) as job:
        job.wait(75)
        assert time.monotonic() - job.start < 60
        for rank in (0, 1, 3):
            assert job[rank].code == 75
            (line,) = job[rank].errors
            assert "gave up after 20 s" in line
            # Those that began later find the first one gone, who had named the missing.
            others = "process 0 does not answer" in line and rank > 0
            assert "of the 4 processes" in line or others
    assert not (tmp_path / "run").exists()
