"""Studies: what is refused, what is run, by whom, and what the numbers mean."""

import pathlib
import re

import numpy as np
import pytest
from scipy import stats

from supcon_jax.study import picture, results, tables
from supcon_jax.study.costs import as_text, estimate
from supcon_jax.study.definition import SCALES, create_study, load_study
from supcon_jax.study.grid import cells, source_of, stage_config
from supcon_jax.tools import study as tool
from tests.small_study import STAGES, make

ROOT = pathlib.Path(__file__).resolve().parents[1]
STUDIES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "studies").glob("*.py")
    if path.name != "common.py"
)

TUNED = {
    "tune": {"optimizer.learning_rate": (0.3, 1.0)},
    "stages": STAGES
    | {
        "corrupted": "configs/robustness_digits.py",
        "tool": ("supcon_jax.tools.embeddings", "{pretrain}"),
    },
}

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
        ({"seeds": "35"}, "got seeds='35'; allowed: how many, or a list of numbers"),
        ({"seeds": 2.5}, "got seeds=2.5; allowed"),
        ({"seeds": (-1,)}, "allowed: how many, or a list of numbers from 0 on"),
        ({"held_out": "0.2"}, "got held_out='0.2'; allowed: a number"),
        ({"tune_seeds": 0.5}, "got tune_seeds=0.5; allowed: a number of seeds"),
        ({"metrics": "evaluate:eval/top1"}, "got metrics='evaluate:eval/top1'; allowed: a list of texts"),
        ({"grid": [("a", 1)]}, "got grid=.*; allowed: a dictionary"),
        ({"grid": {"method": {"a": 1}}, "baseline": {}}, "'a' of axis 'method' is 1; allowed: changes"),
        ({"baseline": "0.1"}, "got baseline='0.1'; allowed: a dictionary"),
        ({"reading": None}, "got reading=None; allowed: a text"),
        ({"paper": {"values": {"0.1": "78 %"}}}, "got paper=.*; allowed: .*number"),
        ({"stages": STAGES | {"tool": ("supcon_jax.tools.gradients", "{pretrain}")}}, "has the tool 'supcon_jax.tools.gradients'; allowed: supcon_jax.tools.embeddings"),
        ({"stages": STAGES | {"tool": ("supcon_jax.tools.embeddings", "{prob}")}}, r"gives \{prob\} to supcon_jax.tools.embeddings; allowed: evaluate, out, pretrain"),
        ({"tune": {"optimizer.learning_rate": (0.1, 0.1)}}, "two settings of tune are called '0.1'"),
        ({"tune": {"method": {"a, b": {"epochs": 1.0}, "a (b)": {"epochs": 2.0}}}}, "two settings of tune are called 'a .b.'"),
        ({"tune": {"evaluate:seed": (10, 20)}, "tune_by": "probe:eval/top1"}, "'10' or '20', changes no stage up to 'probe'"),
        ({**TUNED, "shared": {"data.split_seed": "{seed}"}}, r"'pretrain' and 'probe' have data.split_seed=2 and 0, .*allowed: one for all \(all:data.split_seed\)"),
        ({"held_out": 1.5}, "got held_out=1.5"),
        ({"spread": "epochs"}, "got spread='epochs'; allowed: an axis of the grid"),
        ({"along": "epochs"}, "got along='epochs'; allowed: an axis of the grid"),
        ({"tune_seeds": 4}, r"got tune_seeds=4; allowed: 0 \(each seed chooses for itself\) to 3"),
        ({"paper": {"values": {"0.3": 1.0}}}, "name '0.3', which is no cell; cells: 0.1; 0.5"),
        ({"paper": {"value": {}}}, "unknown key 'value' of paper"),
        ({"shared": {"probe:optimizer.learning_rate": 0.1}}, "stage 'probe': got optimizer.learning_rate=0.1 with probe.solver=lbfgs"),
        ({"tune": {"probe:augment.policy": ("rand_augment",)}}, "got augment.policy='rand_augment' with probe.solver=lbfgs"),
        ({"tune_by": "eval/top1"}, "got the metric 'eval/top1'; allowed: STAGE:METRIC"),
        ({**TUNED, "tune_by": "corrupted:robustness/top1"}, "cell '0.1' is tuned by 'corrupted:robustness/top1'; allowed for tune_by"),
        ({**TUNED, "metrics": ("tool:embedding.ood/knn_auroc",)}, "is tuned by 'tool:embedding.ood/knn_auroc'; allowed"),
        ({**TUNED, "tune_by": "pretrain:train/top1"}, "is tuned by 'pretrain:train/top1'; allowed"),
        ({**TUNED, "tune_by": "evaluate:eval/ece"}, "is tuned by 'evaluate:eval/ece'; allowed"),
        ({**TUNED, "shared": {"probe": None}, "tune_by": "probe:eval/top1"}, "is tuned by 'probe:eval/top1'; allowed"),
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


BROKEN = {
    "SYNTAX": "def get_study(scale):\n    return {\n",
    "KEY": "def get_study(scale):\n    a = {}\n    return a['b']\n",
    "NOTHING": "def get_study(scale):\n    {}\n",
    "ARGUMENT": "def get_study():\n    return {}\n",
}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.py"], "no study file 'nowhere.py'"),
        (["studies/temperature.py", "--scale=large"], "allowed: small, full"),
        (["studies/temperature.py", "--config.epochs=3"], "got --config.epochs=3; allowed"),
        (["studies/common.py"], "studies/common.py has no get_study"),
        (["SYNTAX"], "line 2: SyntaxError: "),
        (["KEY"], "line 3: KeyError: 'b'"),
        (["NOTHING"], "get_study('small') returned None"),
        (["ARGUMENT"], "TypeError: get_study() takes 0 positional arguments"),
        (["studies/temperature.py", "--out=gs://bucket/there"], "a folder on a disk"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(
    arguments, told, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(ROOT)
    if text := BROKEN.get(arguments[0]):
        arguments = [str(tmp_path / "broken.py")]
        (tmp_path / "broken.py").write_text(text)
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
        results.Results,
        "values",
        lambda self, cell, metric: {
            seed: values[cell.values] + sign * (cell.values[0] == "0.2")
            for seed, sign in enumerate((-0.1, 0.0, 0.1))
        },
    )
    panels, labels = tables.panels(results.Results(study, tmp_path))
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
