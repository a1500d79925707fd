"""Studies that tune: what is tried on which images, who chooses, and what runs with it."""

import functools
import pathlib

import pytest

from supcon_jax.study import runner, tables
from supcon_jax.study.jobs import count_jobs
from supcon_jax.study.results import Results
from tests.small_study import STAGES, imitate_stages, make

# Of cross-entropy, which has one stage.
TWO_RATES = {
    "stages": {"pretrain": "configs/cross_entropy_digits.py"},
    "metrics": ("pretrain:eval/top1",),
    "grid": {"loss.label_smoothing": (0.1,)},
    "baseline": {},
    "tune": {"optimizer.learning_rate": (0.1, 0.3)},
}


@pytest.fixture
def fake(monkeypatch):
    return functools.partial(imitate_stages, monkeypatch)


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
    assert count_jobs(Results(study, tmp_path)) == 2 * (3 * 2 + 3)
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
    study = make(**TWO_RATES)
    assert count_jobs(Results(study, tmp_path)) == 3 * (2 + 1)
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
        row.split(",")[3]
        for row in tables.as_csv(Results(study, tmp_path)).splitlines()[1:]
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
    study = make(**TWO_RATES, tune_seeds=1, seeds=2)
    assert not runner.run_study(study, tmp_path)
    assert "| 0.1 | 60.00 ± 0.00 | 0.1 (of 2) |" in tables.as_markdown(
        Results(study, tmp_path)
    )
    broken = False
    commands.commands.clear()
    assert runner.run_study(study, tmp_path)
    assert "| 0.1 | 80.00 ± 0.00 | 0.3 (of 2) |" in tables.as_markdown(
        Results(study, tmp_path)
    )
    again = [pathlib.Path(f["workdir"]).parts[-3] for f in commands.commands]
    assert again == ["0.1-tune-0.3", "0.1-chosen-0.3", "0.1-chosen-0.3"]
