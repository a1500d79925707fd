"""Studies: what is refused, what is run, by whom, and what the numbers mean."""

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
from supcon_jax.study import picture, results, runner
from supcon_jax.study.costs import as_text, estimate
from supcon_jax.study.definition import SCALES, create_study, load_study
from supcon_jax.study.grid import cells, source_of, stage_config
from supcon_jax.study.jobs import count_jobs, jobs
from supcon_jax.tools import study as tool

ROOT = pathlib.Path(__file__).resolve().parents[1]
STUDIES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "studies").glob("*.py")
    if path.name != "common.py"
)
STAGES = {
    "pretrain": "configs/digits.py",
    "probe": "configs/linear_digits.py",
    "evaluate": "configs/evaluate_digits.py",
}
FIELDS = {
    "title": "Temperatures",
    "stages": STAGES,
    "metrics": ("evaluate:eval/top1", "evaluate:eval/ece"),
    "grid": {"loss.temperature": (0.1, 0.5)},
    "seeds": 3,
    "baseline": {"loss.temperature": 0.1},
}


def make(**changes):
    return create_study(FIELDS | changes)


# Definition


@pytest.mark.parametrize("path", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_study_is_right_at_both_scales(path, scale):
    """Loading applies every change of every cell to its config."""
    study = load_study(str(ROOT / path), scale)
    assert len(cells(study)) > 1
    assert len(study.seed_list) >= 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": 3}, "unknown study key 'sedes'; did you mean 'seeds'?"),
        ({"grid": {}}, "the study has an empty 'grid'"),
        ({"grid": {"loss.temperature": ()}}, "axis 'loss.temperature' .* is empty"),
        ({"grid": {"loss.temperature": 0.1}}, "axis 'loss.temperature' is 0.1; allowed"),
        ({"grid": {"loss.temprature": (1.0,)}, "baseline": {}}, "cell '1', stage 'pretrain': unknown config key 'loss.temprature'; did you mean"),
        ({"grid": {"loss.temperature": (-1.0,)}, "baseline": {}}, "got loss.temperature=-1.0; allowed: above 0"),
        ({"grid": {"prob:seed": (1,)}, "baseline": {}}, "got the change 'prob:seed'; allowed before the colon: all, pretrain, probe"),
        ({"grid": {"loss.temperature": (0.1, 0.1)}}, "two cells of the grid are called '0.1'"),
        ({"baseline": {"loss.temperature": 0.3}}, "is no cell of the grid"),
        ({"baseline": {"epochs": 0.3}}, "allowed: axes of the grid"),
        ({"metrics": ("eval/top1",)}, "allowed: STAGE:METRIC"),
        ({"seeds": 0}, "got seeds=0; allowed: 1 or more"),
        ({"seeds": (1, 1)}, "each once"),
        ({"held_out": 1.5}, "got held_out=1.5"),
        ({"spread": "epochs"}, "got spread='epochs'; allowed: an axis of the grid"),
        ({"along": "epochs"}, "got along='epochs'; allowed: an axis of the grid"),
        ({"tune_seeds": 0}, "got tune_seeds=0"),
        ({"paper": {"values": {"0.3": 1.0}}}, "name '0.3', which is no cell; cells: 0.1; 0.5"),
        ({"paper": {"value": {}}}, "unknown key 'value' of paper"),
        ({"shared": {"probe:optimizer.learning_rate": 0.1}}, "stage 'probe': got optimizer.learning_rate=0.1 with probe.solver=lbfgs"),
        ({"tune": {"probe:augment.policy": ("rand_augment",)}}, "got augment.policy='rand_augment' with probe.solver=lbfgs"),
        ({"shared": {"evaluate": None}}, "has no stage 'evaluate', of which the first"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(changes, told):
    with pytest.raises(ValueError, match=told) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_cells_are_all_combinations_with_changes_where_they_belong():
    study = make(
        grid={
            "method": {
                "SupCon": {},
                "cross-entropy": {
                    "pretrain": "configs/cross_entropy_digits.py",
                    "probe": None,
                },
            },
            "all:data.samples_per_class": (5, 20),
        },
        shared={"all:encoder.width": 0.5, "probe:encoder.width": 0.25},
        baseline={"method": "cross-entropy"},
    )
    grid = cells(study)
    assert [cell.label for cell in grid] == [
        "SupCon, 5",
        "SupCon, 20",
        "cross-entropy, 5",
        "cross-entropy, 20",
    ]
    assert study.axes == ["method", "samples per class"]
    first, last = grid[0], grid[-1]
    widths = {s: stage_config(study, first, s).encoder.width for s in STAGES}
    assert widths == {"pretrain": 0.5, "probe": 0.25, "evaluate": 0.5}
    assert stage_config(study, last, "evaluate").data.samples_per_class == 20
    assert list(last.stages) == ["pretrain", "evaluate"]
    assert source_of(first, "probe") == "pretrain"
    assert source_of(first, "evaluate") == "probe"
    assert source_of(last, "evaluate") == "pretrain"
    assert source_of(first, "pretrain") is None


def test_the_seed_may_be_a_value():
    study = make(shared={"all:data.split_seed": "{seed}"})
    config = stage_config(study, cells(study)[0], "probe", seed=7)
    assert (config.seed, config.data.split_seed) == (7, 7)


def test_the_example_of_the_documents_is_a_study():
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/studies.md").read_text(), re.M | re.S
    )
    names = {}
    exec(example, names)
    for scale in SCALES:
        assert len(cells(create_study(names["get_study"](scale)))) == 3


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
    assert pretrainings(grid={"all:encoder.width": (0.5, 1.0)}, tune=rates) == 2 + 6
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


def test_costs_are_counted_by_hand():
    study = make(
        grid={"batch_size": (128, 64)},
        baseline={},
        shared={
            "epochs": 2.0,
            "all:data.samples_per_class": 15,
            "probe:batch_size": 50,
        },
        seeds=3,
    )
    costs = estimate(study)
    steps = int(2 * 150 / 128), int(2 * 150 / 64)
    assert costs["pretrain"].runs == 6
    assert costs["pretrain"].steps == 3 * sum(steps)
    assert costs["pretrain"].images == 3 * 2 * (steps[0] * 128 + steps[1] * 64)
    assert costs["probe"].images == 6 * 150
    told = as_text(study, costs, pathlib.Path("nowhere"))
    assert "2 cells x 3 seeds" in told and "0 of 6 jobs are done" in told


def test_dry_run_runs_nothing(fake, tmp_path, monkeypatch, capsys):
    commands = fake()
    monkeypatch.chdir(ROOT)
    tool.main(["studies/temperature.py", f"--out={tmp_path / 'out'}", "--dry_run"])
    assert "TFLOP" in capsys.readouterr().out
    assert commands.commands == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.py"], "no study file 'nowhere.py'"),
        (["studies/temperature.py", "--scale=large"], "allowed: small, full"),
        (["studies/temperature.py", "--config.epochs=3"], "got --config.epochs=3; allowed"),
        (["studies/common.py"], "studies/common.py has no get_study"),
        (["studies/temperature.py", "--out=gs://bucket/there"], "a folder on a disk"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(arguments, told, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        tool.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_an_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1, 1, 6), rng.normal(0, 1, 6)
    found = results.paired(dict(enumerate(ours - theirs)))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], [low, high]
    )
    assert found.is_real == (low > 0 or high < 0)
    assert results.paired({0: 0.5}).half == np.inf
    assert results.paired({}) is None


def test_the_picture_has_differences_with_their_intervals(monkeypatch, tmp_path):
    study = make(
        grid={"loss.temperature": (0.1, 0.2), "case": {"a": {}, "b": {"epochs": 3.0}}},
        baseline={"loss.temperature": 0.1},
        along="loss.temperature",
    )
    values = {
        ("0.1", "a"): 0.5,
        ("0.2", "a"): 0.7,
        ("0.1", "b"): 0.4,
        ("0.2", "b"): 0.3,
    }
    monkeypatch.setattr(
        results,
        "values_of",
        lambda study, cell, metric, out: {
            seed: values[cell.values] + sign * (cell.values[0] == "0.2")
            for seed, sign in enumerate((-0.1, 0.0, 0.1))
        },
    )
    panels, labels = results._panels(study, tmp_path)
    assert [line.name for line in panels["measured here"]] == ["a", "b"]
    assert labels["x"] == "temperature"
    first, second = panels["against 0.1"]
    assert first.places == second.places == ["0.2"]
    np.testing.assert_allclose([first.values[0], second.values[0]], [[20.0], [-10.0]])
    # t(2) = 4.303, a deviation of 10 points, three seeds.
    np.testing.assert_allclose(first.halves, [4.3027 * 10 / 3**0.5], rtol=1e-4)


def test_names_and_numbers_are_drawn():
    for places in (["0.1", "1", "10"], ["none", "linear", "MLP"]):
        line = picture.Line("", places, [[1.0, 2.0], [2.0, 3.0], [4.0]])
        other = picture.Line("b", places[1:], [[0.5], [1.0]], [0.2, 0.3])
        drawn = picture.plot_study(
            "Title",
            {"ours": [line], "against none": [other]},
            {"x": "x", "ours": "top-1", "against none": "difference"},
        )
        assert drawn.startswith(b"\x89PNG")
    assert picture.plot_study("Title", {"ours": []}, {}) is None


def test_a_value_far_from_all_others_is_written_at_the_border():
    from matplotlib.figure import Figure

    places = ["few", "many"]
    lines = [
        picture.Line("a", places, [[94.0, 96.0], [91.0, 93.0]]),
        picture.Line("b", places, [[93.0, 95.0], [26.0, 28.0]]),
        picture.Line("c", places, [[96.0, 97.0], [90.0, 92.0]]),
    ]
    axis = Figure().subplots()
    picture._leave_outliers_out(axis, lines, places, ["a", "b", "c"])
    (text,) = axis.texts
    assert text.get_text().endswith(" 27.0") and text.get_position() == (0.01, 1.0)
    low, high = axis.get_xlim()
    assert 28 < low < 90 and 97 < high < 99
    near = lines[1]._replace(values=[[93.0, 95.0], [86.0, 88.0]])
    for others in (lines[::2], [lines[0], near, lines[2]]):
        axis = Figure().subplots()
        picture._leave_outliers_out(axis, others, places, ["a", "b", "c"])
        assert not axis.texts


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
