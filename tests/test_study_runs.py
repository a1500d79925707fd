"""Studies: what is run, by whom, and what the tables say of it."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from supcon_jax.run.stop import StopRequests
from supcon_jax.storage.lock import Lock
from supcon_jax.study import results, runner
from supcon_jax.study.costs import estimate
from supcon_jax.study.jobs import jobs
from supcon_jax.tools import study as tool
from tests.small_study import FIELDS, STAGES, by_temperature, imitate_stages, make

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Running; the processes are imitated, except in the last test.


@pytest.fixture
def fake(monkeypatch):
    return functools.partial(imitate_stages, monkeypatch)


def test_stages_run_in_order_with_the_seed_and_the_workdir_before(fake, tmp_path):
    commands = fake()
    assert runner.run_study(make(seeds=1), tmp_path, places=["data.dir=there"])
    assert commands.stages() == [*STAGES, *STAGES]
    pretrain, probe, evaluate = commands.commands[:3]
    assert pretrain["config"] == "configs/digits.py"
    assert pretrain["config.loss.temperature"] == "0.1"
    assert probe["config.pretrained"] == pretrain["workdir"]
    assert evaluate["config.pretrained"] == probe["workdir"]
    assert {flags["config.seed"] for flags in commands.commands} == {"0"}
    assert {flags["config.data.dir"] for flags in commands.commands} == {"there"}


def test_the_eta_counts_the_other_runners(monkeypatch):
    """Three runners since t = 100, one of them in a job that had begun before."""
    monkeypatch.setattr(time, "time", lambda: 200.0)
    over = [
        {"time": 190.0, "seconds": {"pretrain": 70.0, "probe": 20.0}},
        {"time": 200.0, "seconds": {"pretrain": 100.0}},
        {"time": 195.0, "seconds": {"pretrain": 400.0}},
        {"time": 50.0, "seconds": {"pretrain": 30.0}},  # another day
    ]
    assert runner.busy_runners(over, 100.0) == pytest.approx(0.9 + 1.0 + 0.95)
    assert runner.busy_runners([], 100.0) == 1.0


def test_the_table_has_means_deviations_and_paired_intervals(fake, tmp_path):
    fake()
    study = make(
        paper={"source": "Figure 4", "values": {"0.1": 78.7}}, spread="loss.temperature"
    )
    assert runner.run_study(study, tmp_path)
    table = (tmp_path / "results.md").read_text()
    ours = np.array([0.92, 0.932, 0.944])
    theirs = np.array([0.9, 0.91, 0.92])
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert "| 0.1 | 91.00 ± 1.00 | 0.0450 ± 0.0050 |  | 78.7 |" in table
    half = 50 * (high - low)
    assert (
        f"| 0.5 | 93.20 ± 1.20 | 0.0340 ± 0.0060 | **+2.20 ± {half:.2f}** |  |" in table
    )
    # ECE is 0.5 less half of it.
    (row,) = re.findall(r"^\| 0.5 \| (\S+) ± (\S+) \|$", table, re.M)
    assert row == ("**-0.0110", f"{half / 200:.4f}**")
    assert "paper: Figure 4" in table
    assert "| 0.5 | 1 | 93.20 | 0.00 | 93.20 | 93.20 |  |" in table
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert (
        rows[0]
        == "temperature,seed,evaluate:eval/top1,evaluate:eval/ece,chosen,seconds,failed"
    )
    assert len(rows) == 7 and rows[4].startswith("0.5,0,0.92,0.0")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_spreads_over_settings_are_compared_seed_by_seed(fake, tmp_path):
    rates = {"0.1": 0.1, "0.3": 0.4, "1": 0.8}

    def value(flags):
        """One method hangs on its rate ten times as much as the other."""
        seed, cell = int(flags["config.seed"]), pathlib.Path(flags["workdir"]).parts[-3]
        method, rate = cell.split("_")
        much = 0.1 + 0.02 * seed if method == "simclr" else 0.01
        return 0.5 + much * rates[rate]

    fake(value)
    study = make(
        grid={
            "loss.name": ("supcon", "simclr"),
            "optimizer.learning_rate": (0.1, 0.3, 1.0),
        },
        baseline={"loss.name": "supcon"},
        spread="loss.name",
    )
    assert runner.run_study(study, tmp_path)
    table = (tmp_path / "results.md").read_text()
    each = [np.std([*rates.values()], ddof=1) * (0.09 + 0.02 * s) for s in range(3)]
    low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    told = f"**{100 * np.mean(each):+.2f} ± {50 * (high - low):.2f}**"
    (row,) = re.findall(r"^\| simclr \| 3 \|.*$", table, re.M)
    assert row.endswith(f"| {told} |")
    assert "deviation against supcon's" in table


def test_dry_run_runs_nothing(fake, tmp_path, monkeypatch, capsys):
    commands = fake()
    monkeypatch.chdir(ROOT)
    tool.main(["studies/temperature.py", f"--out={tmp_path / 'out'}", "--dry_run"])
    assert "TFLOP" in capsys.readouterr().out
    assert commands.commands == [] and not (tmp_path / "out").exists()


def test_what_is_done_is_not_run_again(fake, tmp_path):
    fake()
    runner.run_study(make(), tmp_path)
    again = fake()
    assert runner.run_study(make(), tmp_path)
    assert again.commands == []
    runner.run_study(make(seeds=4), tmp_path)  # more seeds join those that are there
    assert {flags["config.seed"] for flags in again.commands} == {"3"}


def test_a_failed_job_is_told_the_others_go_on_and_it_is_tried_again(
    fake, tmp_path, monkeypatch, capsys
):
    def fails(flags):
        if flags["stage"] == "probe" and flags["config.seed"] == "1":
            return "exit code 1: the disk is full"
        return by_temperature(flags)

    fake(fails)
    (tmp_path / "one.py").write_text(f"def get_study(scale):\n    return {FIELDS!r}\n")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path / "one.py"), f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 1
    assert "2 failed, 0.1, seed 1: probe: exit code 1" in capsys.readouterr().err
    table = (tmp_path / "out" / "results.md").read_text()
    assert "- 0.5, seed 1: probe: exit code 1: the disk is full" in table
    assert "| 0.1 | 91.00 ± 1.41 (n=2) |" in table  # of seeds 0 and 2
    assert re.search(r"\| \+2.20 ± 2.54 \(n=2\) \|$", table, re.M)
    again = fake()
    tool.main([str(tmp_path / "one.py"), f"--out={tmp_path / 'out'}"])
    assert {flags["config.seed"] for flags in again.commands} == {"1"}
    assert "Failed" not in (tmp_path / "out" / "results.md").read_text()


def test_another_study_over_old_results_is_refused(fake, tmp_path):
    fake()
    runner.run_study(make(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    changed = make(shared={"epochs": 3.0})
    told = r"changes of cell '0.1', 'pretrain', was .* and is .*epochs=3"
    with pytest.raises(ValueError, match=told):
        runner.run_study(changed, tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    runner.run_study(make(title="Another title", reading="So it is."), tmp_path)


CONFIG = """
from configs import digits

def get_config():
    config = digits.get_config()
    config.optimizer.learning_rate = {rate}
    config.log_every = {log_every}
    return config
"""


def test_a_base_config_that_was_edited_is_refused_over_old_results(fake, tmp_path):
    commands = fake()
    file = tmp_path / "mine.py"

    def study(rate, log_every=10, **changes):
        file.write_text(CONFIG.format(rate=rate, log_every=log_every))
        return make(stages=STAGES | {"pretrain": str(file)}, **changes)

    runner.run_study(study(0.1, seeds=1), tmp_path / "out")
    with pytest.raises(
        ValueError, match="learning_rate in .*mine.py was 0.1 and is 0.9"
    ):
        runner.run_study(study(0.9, seeds=2), tmp_path / "out")
    commands.commands.clear()
    # What changes no result may change.
    runner.run_study(study(0.1, log_every=20, seeds=2), tmp_path / "out")
    assert {flags["config.seed"] for flags in commands.commands} == {"1"}


def test_another_study_in_the_folder_is_refused(fake, tmp_path):
    fake()
    runner.run_study(make(), tmp_path)
    other = make(grid={"epochs": (2.0, 3.0)}, baseline={})
    with pytest.raises(
        ValueError, match="its cells are 0.1; 0.5, of which this one has"
    ):
        runner.run_study(other, tmp_path)
    # Of a study that tunes nothing, how it would be tuned is nothing that results hang on.
    runner.run_study(make(held_out=0.3, metrics=("evaluate:eval/ece",)), tmp_path)


def test_a_cell_of_another_name_and_the_same_folder_is_the_same_cell(fake, tmp_path):
    commands = fake()

    def study(label, epochs):
        return make(grid={"method": {label: {"epochs": epochs}}}, baseline={})

    runner.run_study(study("SupCon, long", 2.0), tmp_path)
    with pytest.raises(
        ValueError, match="cell 'SupCon, long', 'pretrain', was .*epochs=2"
    ):
        runner.run_study(study("SupCon (long)", 20.0), tmp_path)
    commands.commands.clear()
    runner.run_study(study("SupCon (long)", 2.0), tmp_path)
    assert commands.commands == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_shown_and_the_others_go_on(fake, tmp_path, value):
    def diverges(flags):
        first = flags["config.seed"] == "0" and "0.5" in flags["workdir"]
        return value if first else by_temperature(flags)

    fake(diverges)
    runner.run_study(make(spread="loss.temperature"), tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert re.search(r"^\| 0.1 \| 91.00 ± 1.00 \|", table, re.M)
    assert re.search(rf"^\| 0.5 \| {value} \| -?{value} \|  \|$", table, re.M)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_no_run_wrote_is_a_failure(fake, tmp_path):
    commands = fake()
    assert not runner.run_study(make(metrics=("evaluate:eval/topp1",)), tmp_path / "a")
    table = (tmp_path / "a" / "results.md").read_text()
    assert "0.1, seed 0: evaluate: it wrote no eval/topp1" in table
    assert "it wrote eval/ece, eval/top1" in table
    metrics = ("evaluate:eval/top1", "evaluate:eval/topp5")
    assert not runner.run_study(make(metrics=metrics), tmp_path / "b")
    table = (tmp_path / "b" / "results.md").read_text()
    assert "- the metric 'evaluate:eval/topp5' was written by no run" in table
    # Trials that nothing judges choose nothing.
    commands.commands.clear()
    tuned = {"tune": {"epochs": (1.0, 2.0)}, "tune_by": "pretrain:knn/top1"}
    assert not runner.run_study(make(**tuned, seeds=1), tmp_path / "c")
    assert commands.stages() == ["pretrain"] * 4
    table = (tmp_path / "c" / "results.md").read_text()
    assert "0.1 [1], seed 0: pretrain: it wrote no knn/top1" in table


def test_a_job_that_read_other_images_is_told(fake, tmp_path):
    """A second machine whose copy of the data is not whole."""
    examples = {"0": 100, "1": 100, "2": 90}

    def value(flags):
        folder = pathlib.Path(flags["workdir"])
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "mode": flags["stage"],
            "data": {"name": "digits", "dir": folder.name},
        }
        (folder / "config.json").write_text(json.dumps(config))
        run = {"data": {"train": {"digest": examples[flags["config.seed"]]}}}
        (folder / "run.json").write_text(json.dumps(run))
        return 0.9

    fake(value)
    assert not runner.run_study(make(grid={"loss.temperature": (0.1,)}), tmp_path)
    failed = results.Results(
        make(grid={"loss.temperature": (0.1,)}), tmp_path
    ).failures()
    assert failed == [
        "0.1, seed 2: its images are not those of '0.1, seed 0', which has the same "
        "config; is --config.data.dir, or --config.data.root, that of the other runners, "
        "and whole?"
    ]


CHILD = """
import pathlib, sys, time
print("error: of the second" if pathlib.Path("lived").exists() else "error: of the first")
pathlib.Path("lived").touch()
time.sleep(60)
"""


def test_a_stage_outlives_its_runner_and_keeps_the_job(tmp_path):
    """Killed without a word, the runner leaves its stage behind; nobody starts it again."""
    script = f"""
import pathlib, subprocess, sys
from supcon_jax.run.stop import StopRequests
from supcon_jax.storage.lock import Lock
from supcon_jax.study import runner
lock = Lock(".")
with StopRequests() as stop:
    command = [sys.executable, "-c", {CHILD!r}]
    print(runner._run(command, pathlib.Path("stage.log"), stop, lock))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while not (tmp_path / "lived").exists():
        time.sleep(0.1)
    (child,) = map(
        int,
        pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        .read_text()
        .split(),
    )
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="in use by another run"):
        Lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    while pathlib.Path(f"/proc/{child}").exists():
        time.sleep(0.1)
    # What the second attempt died of is told, not what stands in the log from the first.
    lock = Lock(tmp_path)
    with StopRequests() as stop:
        command = [
            sys.executable,
            "-uc",
            "import os; print('bye'); os.kill(os.getpid(), 9)",
        ]
        told = runner._run(command, tmp_path / "stage.log", stop, lock)
    assert told == "killed by SIGKILL: bye"
    lock.release()


def test_a_job_that_was_resumed_took_as_long_as_all_its_attempts(fake, tmp_path):
    fake()
    study = make(seeds=1, grid={"loss.temperature": (0.1,)})

    def value(flags):
        return {"wall_s": 100.0, "value": 0.9}

    fake(value)
    runner.run_study(study, tmp_path)
    row = (tmp_path / "results.csv").read_text().splitlines()[1]
    assert float(row.split(",")[-2]) == pytest.approx(300.0, abs=1.0)


def test_a_job_that_another_runner_has_is_left_to_it(fake, tmp_path, monkeypatch):
    commands = fake()
    study = make(seeds=1)
    first, second = jobs(results.Results(study, tmp_path))
    first.folder(tmp_path).mkdir(parents=True)
    other = Lock(first.folder(tmp_path))

    def waits(seconds):
        """The other one ends with its job done."""
        assert [f["workdir"].split("/")[-3] for f in commands.commands] == ["0.5"] * 3
        done = {"metrics": {"evaluate:eval/top1": 0.5}, "seconds": {}, "time": 0.0}
        (first.folder(tmp_path) / "result.json").write_text(json.dumps(done))
        other.release()

    monkeypatch.setattr(runner.time, "sleep", waits)
    assert runner.run_study(study, tmp_path)
    assert commands.stages() == [*STAGES]
    assert "50.00" in (tmp_path / "results.md").read_text()


SHARED = {
    "stages": STAGES | {"probe": "configs/linear_digits.py:sgd"},
    "grid": {
        "loss.temperature": (0.1, 0.5),
        "probe": {
            "fast": {"probe:optimizer.learning_rate": 0.5},
            "slow": {"probe:optimizer.learning_rate": 0.1},
        },
    },
    "seeds": 2,
}


def test_a_stage_that_cells_share_is_run_once(fake, tmp_path):
    commands = fake()
    study = make(**SHARED)
    assert runner.run_study(study, tmp_path)
    assert commands.stages().count("pretrain") == 2 * 2
    assert commands.stages().count("probe") == 2 * 4
    costs = estimate(study)
    assert (costs["pretrain"].runs, costs["probe"].runs) == (4, 8)
    for flags in commands.commands:
        if flags["stage"] == "probe":  # of the same temperature and seed
            source = pathlib.Path(flags["config.pretrained"])
            cell, seed = pathlib.Path(flags["workdir"]).parts[-3:-1]
            assert source.parts[-2] == seed and cell.startswith(source.parts[-3][:3])
    # All cells have the metrics of the stage that only the first one ran.
    slow = next(
        job
        for job in jobs(results.Results(study, tmp_path))
        if job.words == "0.5, slow, seed 1"
    )
    result = results.read(slow.folder(tmp_path))
    assert "pretrain:eval/top1" in result["metrics"]
    assert result["shared"] == {"pretrain": "runs/0.5_fast/seed1/pretrain"}
    assert not (slow.folder(tmp_path) / "pretrain").exists()


def test_only_what_is_equal_from_the_beginning_is_shared():
    def pretrainings(**changes):
        study = make(**{"stages": SHARED["stages"], "baseline": {}} | changes)
        return estimate(study)["pretrain"].runs

    rates = {"probe:optimizer.learning_rate": (0.1, 0.5)}
    assert pretrainings(grid=rates) == 3
    assert pretrainings(grid=rates | {"optimizer.learning_rate": (0.1, 0.5)}) == 6
    # Trials of the probe share theirs, which has not seen the held-out images.
    tuned = {"grid": {"all:encoder.width": (0.5, 1.0)}, "tune": rates}
    assert pretrainings(**tuned, tune_seeds=1) == 2 + 6
    assert pretrainings(**tuned) == 6 + 6
    tool = ("supcon_jax.tools.embeddings", "{pretrain}")
    ordered = ("pretrain", "tool", "probe")
    stages = {name: (SHARED["stages"] | {"tool": tool})[name] for name in ordered}
    changes = {"stages": stages, "metrics": ("probe:eval/top1",)}
    # A tool writes into the workdir that it is given, so each cell has one of its own.
    assert pretrainings(grid=rates, **changes) == 2 * 3


def test_a_job_waits_for_the_one_that_runs_its_stage(fake, tmp_path, monkeypatch):
    commands = fake()
    study = make(
        **SHARED | {"grid": {"probe": SHARED["grid"]["probe"]}, "seeds": 1}, baseline={}
    )
    first, second = jobs(results.Results(study, tmp_path))
    first.folder(tmp_path).mkdir(parents=True)
    other = Lock(first.folder(tmp_path))

    def waits(seconds):
        """The other one has not begun, is in the middle, is killed."""
        assert commands.commands == []
        if (first.folder(tmp_path) / "pretrain").exists():
            other.release()
        (first.folder(tmp_path) / "pretrain").mkdir(exist_ok=True)

    monkeypatch.setattr(runner.time, "sleep", waits)
    assert runner.run_study(study, tmp_path)
    assert commands.stages() == ["pretrain", "probe", "evaluate", "probe", "evaluate"]


def test_a_job_whose_shared_stage_failed_runs_its_own(fake, tmp_path):
    def value(flags):
        fails = "fast" in flags["workdir"] and flags["stage"] == "pretrain"
        return "exit code 1: killed" if fails else 0.9

    commands = fake(value)
    study = make(
        **SHARED | {"grid": {"probe": SHARED["grid"]["probe"]}, "seeds": 1}, baseline={}
    )
    assert not runner.run_study(study, tmp_path)
    assert commands.stages() == ["pretrain", *STAGES]
    # Tried again, the first one finds what the second one has.
    again = fake()
    assert runner.run_study(study, tmp_path)
    assert again.stages() == ["probe", "evaluate"]


TINY = """
def get_study(scale):
    return {
        "title": "Tiny",
        "stages": {"pretrain": "configs/digits.py", "probe": "configs/linear_digits.py"},
        "grid": {"loss.temperature": (0.1, 0.5)},
        "shared": {"total_steps": 12, "batch_size": 32, "all:encoder.width": 0.25,
                   "optimizer.warmup_epochs": 0.1, "checkpoint_every": 3},
        "seeds": 2,
        "metrics": ("probe:eval/top1",),
    }
"""


@pytest.mark.slow
def test_a_study_that_is_killed_and_shared_ends_like_one_that_is_not(tmp_path):
    """Real processes: one runner to the end; another folder with kills and two runners."""
    (tmp_path / "tiny.py").write_text(TINY)

    def start(out):
        command = [sys.executable, "-m", "supcon_jax.tools.study"]
        command += [str(tmp_path / "tiny.py"), f"--out={tmp_path / out}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    assert start("whole").wait() == 0
    for seconds, number in ((9, signal.SIGKILL), (14, signal.SIGTERM)):
        process = start("cut")
        time.sleep(seconds)
        process.send_signal(number)
        output, _ = process.communicate()
        if number == signal.SIGTERM:
            assert process.returncode == 0 and "the same command goes on" in output
    both = [start("cut"), start("cut")]
    assert [process.wait() for process in both] == [0, 0]

    def without_seconds(out):
        rows = (tmp_path / out / "results.csv").read_text().splitlines()
        return [row.rsplit(",", 2)[0] for row in rows]

    assert without_seconds("cut") == without_seconds("whole")
    assert len(without_seconds("cut")) == 5
