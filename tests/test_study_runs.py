"""Studies: what is run, by whom, and what the tables say of it."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from supcon_jax.storage.lock import Lock
from supcon_jax.study import results, runner
from supcon_jax.study.costs import estimate
from supcon_jax.study.jobs import count_jobs, jobs
from supcon_jax.tools import study as tool
from tests.small_study import FIELDS, STAGES, make

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Running; the processes are imitated, except in the last test.


class Fake:
    """In the place of a stage's process: `value(flags)` is its accuracy, or its failure."""

    def __init__(self, value):
        self.value = value
        self.commands = []

    def __call__(self, command, log, stop):
        flags = dict(w[2:].split("=", 1) for w in command if w.startswith("--"))
        flags["stage"] = pathlib.Path(flags["workdir"]).name
        self.commands.append(flags)
        value = self.value(flags)
        if isinstance(value, str):
            return value
        folder = pathlib.Path(flags["workdir"])
        folder.mkdir(parents=True, exist_ok=True)
        line = {
            "step": 1,
            "eval/top1": value,
            "eval/ece": 0.5 - value / 2,
            "final": True,
        }
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return ""

    def stages(self):
        return [flags["stage"] for flags in self.commands]


def by_temperature(flags):
    """0.9 and 0.92 at seed 0, a little more at each seed."""
    seed = int(flags["config.seed"])
    better = 0.02 + 0.002 * seed if "0.5" in flags["workdir"] else 0
    return 0.9 + 0.01 * seed + better


@pytest.fixture
def fake(monkeypatch):
    def install(value=by_temperature):
        found = Fake(value)
        monkeypatch.setattr(runner, "_run", found)
        return found

    return install


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
    assert "2 jobs failed" in capsys.readouterr().err
    table = (tmp_path / "out" / "results.md").read_text()
    assert "- 0.5, seed 1: probe: exit code 1: the disk is full" in table
    assert "| 0.1 | 91.00 ± 1.41 |" in table  # of seeds 0 and 2
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


def test_a_job_that_another_runner_has_is_left_to_it(fake, tmp_path, monkeypatch):
    commands = fake()
    study = make(seeds=1)
    first, second = jobs(study, tmp_path)
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
        job for job in jobs(study, tmp_path) if job.words == "0.5, slow, seed 1"
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
    first, second = jobs(study, tmp_path)
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


def test_tuning_chooses_on_held_out_images_and_the_test_is_read_once(fake, tmp_path):
    def value(flags):
        rate = float(flags.get("config.optimizer.learning_rate", 0))
        return 0.5 + {0.1: 0.1, 0.3: 0.3, 1.0: 0.2}.get(rate, 0)

    commands = fake(value)
    study = make(
        stages={"pretrain": "configs/cross_entropy_digits.py"},
        metrics=("pretrain:eval/top1",),
        grid={"loss.label_smoothing": (0.0, 0.1)},
        baseline={},
        tune={"optimizer.learning_rate": (0.1, 0.3, 1.0)},
        tune_seeds=2,
        held_out=0.25,
    )
    assert count_jobs(study) == 2 * (3 * 2 + 3)
    assert runner.run_study(study, tmp_path)
    held = [f for f in commands.commands if "config.data.validation_fraction" in f]
    final = [f for f in commands.commands if "config.data.validation_fraction" not in f]
    assert len(held) == 12 and len(final) == 6
    assert {f["config.data.validation_fraction"] for f in held} == {"0.25"}
    assert {f["config.optimizer.learning_rate"] for f in final} == {"0.3"}
    assert (
        "| 0.1 | 80.00 ± 0.00 | 0.3 (of 3) |" in (tmp_path / "results.md").read_text()
    )


def test_each_seed_chooses_for_itself(fake, tmp_path):
    """So the spread of the results holds what the choice adds to it."""

    def value(flags):
        rate = float(flags["config.optimizer.learning_rate"])
        return 0.9 if (rate == 0.3) == (flags["config.seed"] != "0") else 0.8

    commands = fake(value)
    study = make(
        stages={"pretrain": "configs/cross_entropy_digits.py"},
        metrics=("pretrain:eval/top1",),
        grid={"loss.label_smoothing": (0.1,)},
        baseline={},
        tune={"optimizer.learning_rate": (0.1, 0.3)},
    )
    assert count_jobs(study) == 3 * (2 + 1)
    assert runner.run_study(study, tmp_path)
    final = {
        f["config.seed"]: f["config.optimizer.learning_rate"]
        for f in commands.commands
        if "config.data.validation_fraction" not in f
    }
    assert final == {"0": "0.1", "1": "0.3", "2": "0.3"}
    table = (tmp_path / "results.md").read_text()
    assert "| 0.1 | 90.00 ± 0.00 | 0.3: 2; 0.1: 1 (of 2) |" in table
    assert "by each seed for itself, so that intervals include the choice" in table
    assert [
        row.split(",")[3] for row in results.as_csv(study, tmp_path).splitlines()[1:]
    ] == [
        "0.1",
        "0.3",
        "0.3",
    ]


def test_tuning_by_a_stage_before_the_one_that_is_reported(fake, tmp_path, caplog):
    """The corrupted test images are not even read by trials."""

    def value(flags):
        fast = "tune-0.3" in flags["workdir"]
        return {"evaluate": 0.6 + 0.2 * fast, "corrupted": 0.4}.get(flags["stage"], 0.5)

    commands = fake(value)
    study = make(
        stages=STAGES | {"corrupted": "configs/robustness_digits.py"},
        metrics=("corrupted:eval/top1",),
        grid={"loss.temperature": (0.1, 0.5)},
        tune={"optimizer.learning_rate": (0.1, 0.3)},
        tune_by="evaluate:eval/top1",
        seeds=1,
    )
    with caplog.at_level("INFO"):
        assert runner.run_study(study, tmp_path)
    assert "0.1 [0.3], seed 0: top-1 80.00%" in caplog.text
    held = [f for f in commands.commands if "config.data.validation_fraction" in f]
    assert {f["stage"] for f in held} == {*STAGES}
    table = (tmp_path / "results.md").read_text()
    assert "| 0.3 (of 2) |" in table and "chosen by top-1 on 20 %" in table


def test_a_failed_trial_that_wins_when_tried_again_is_what_the_cell_runs_with(
    fake, tmp_path
):
    """What ran with the former choice is neither shown as the new one's nor gone on with."""
    broken = True

    def value(flags):
        fast = flags.get("config.optimizer.learning_rate") == "0.3"
        if broken and "tune-0.3" in flags["workdir"]:
            return "exit code 1: no memory"
        return 0.8 if fast else 0.6

    commands = fake(value)
    study = make(
        stages={"pretrain": "configs/cross_entropy_digits.py"},
        metrics=("pretrain:eval/top1",),
        grid={"loss.label_smoothing": (0.1,)},
        baseline={},
        tune={"optimizer.learning_rate": (0.1, 0.3)},
        tune_seeds=1,
        seeds=2,
    )
    assert not runner.run_study(study, tmp_path)
    assert "| 0.1 | 60.00 ± 0.00 | 0.1 (of 2) |" in results.as_markdown(study, tmp_path)
    broken = False
    commands.commands.clear()
    assert runner.run_study(study, tmp_path)
    assert "| 0.1 | 80.00 ± 0.00 | 0.3 (of 2) |" in results.as_markdown(study, tmp_path)
    again = [pathlib.Path(f["workdir"]).parts[-3] for f in commands.commands]
    assert again == ["0.1-tune-0.3", "0.1-chosen-0.3", "0.1-chosen-0.3"]


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
