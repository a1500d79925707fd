"""Mean and deviation over seeds, from what runs left in their workdirs."""

import json
import math

import pytest

from supcon_jax import linear_eval
from supcon_jax.tools import seeds
from tests.runs import linear_config, snapshot


def make_run(path, seed, top1, final=True, **config):
    """A workdir as a run leaves it: the config, a line on the way and the last one."""
    path.mkdir()
    config = {"seed": seed, "batch_size": 16, "data": {"dir": str(path)}} | config
    (path / "config.json").write_text(json.dumps(config))
    last = {"step": 20, "epoch": 2.0, "wall_s": 9.5 + seed, "train/loss": 1.0 + top1}
    last |= {"eval/top1": top1, "eval/num_examples": 500}
    lines = [{"step": 10, "epoch": 1.0, "wall_s": 5.0, "train/loss": 2.0}]
    lines += [last | {"final": True}] if final else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return str(path)


def run(*arguments):
    """Exit code 2 and its line, or None."""
    with pytest.raises(SystemExit) as exit:
        seeds.main([str(argument) for argument in arguments])
    assert exit.value.code == 2


def test_table_and_file(tmp_path, capsys):
    # Given in another order than that of the seeds.
    runs = [
        make_run(tmp_path / f"s{s}", s, t) for s, t in ((2, 0.5), (0, 0.8), (1, 0.6))
    ]
    out = tmp_path / "seeds.json"
    seeds.main([*runs, f"--out={out}"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| metric | mean ± deviation | seeds 0, 1, 2 |"
    assert "| eval/top1 (%) | 63.33 ± 15.28 | 80.00, 60.00, 50.00 |" in table
    assert "| train/loss | 1.6333 ± 0.15275 | 1.8, 1.6, 1.5 |" in table
    assert not any("wall_s" in line or "step" in line for line in table)
    written = json.loads(out.read_text())
    assert written["seeds"] == [0, 1, 2]
    assert written["workdirs"] == [runs[1], runs[2], runs[0]]
    top1 = written["metrics"]["eval/top1"]
    assert top1["values"] == [0.8, 0.6, 0.5]
    mean = 1.9 / 3
    squares = sum((value - mean) ** 2 for value in top1["values"])
    assert top1["mean"] == pytest.approx(mean)
    assert top1["deviation"] == pytest.approx(math.sqrt(squares / 2))
    assert written["metrics"]["eval/num_examples"]["deviation"] == 0


def test_what_may_differ(tmp_path, capsys):
    """The encoder of a seed, and where data lie."""
    runs = [
        make_run(
            tmp_path / f"s{s}", s, 0.5, pretrained=f"runs/s{s}", next_config=f"{s}"
        )
        for s in (0, 1)
    ]
    seeds.main(runs)
    assert "50.00 ± 0.00" in capsys.readouterr().out


def test_a_metric_that_one_run_lacks_is_left_out(tmp_path):
    runs = [make_run(tmp_path / f"s{s}", s, 0.5) for s in (0, 1)]
    path = tmp_path / "s1" / "metrics.jsonl"
    path.write_text(path.read_text().replace("eval/top1", "knn/top1"))
    assert set(seeds.summarize(runs)["metrics"]) == {"train/loss", "eval/num_examples"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"final": False}, "s1 is not finished (it reached step 10)"),
        ({"batch_size": 32}, "different configs; differing: batch_size (16, 32)"),
        ({"loss": {"temperature": 1}}, "differing: loss.temperature (None, 1)"),
        ({"seed": 0}, "have the same seed, 0"),
    ],
)
def test_no_sample_of_one_config(change, message, tmp_path, capsys):
    first = make_run(tmp_path / "s0", 0, 0.5)
    second = make_run(tmp_path / "s1", **({"seed": 1, "top1": 0.6} | change))
    before = snapshot(tmp_path)
    run(first, second, f"--out={tmp_path / 'out.json'}")
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and snapshot(tmp_path) == before


def test_no_runs(tmp_path, capsys):
    first = make_run(tmp_path / "s0", 0, 0.5)
    run(first, tmp_path / "nowhere")
    assert "no run in" in capsys.readouterr().err
    run(first)
    assert "needs two or more" in capsys.readouterr().err
    run(first, first)
    assert "the same seed" in capsys.readouterr().err
    second = make_run(tmp_path / "s1", 1, 0.5)
    (tmp_path / "s1" / "metrics.jsonl").unlink()
    run(first, second)
    assert "not finished (no metrics)" in capsys.readouterr().err
    (tmp_path / "s1" / "config.json").write_text("{")
    run(first, second)
    assert "cannot read" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    runs = [make_run(tmp_path / f"s{s}", s, 0.5) for s in (0, 1)]
    run(*runs, f"--out={tmp_path / 'no' / 'seeds.json'}")
    assert "(--out)" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs(tmp_path):
    """What a run writes is what this reads."""
    workdirs = []
    for seed in (0, 1):
        workdirs.append(str(tmp_path / f"seed{seed}"))
        linear_eval.linear_eval(linear_config("random", seed=seed), workdirs[-1])
    found = seeds.summarize(workdirs)
    assert found["seeds"] == [0, 1]
    assert found["metrics"]["eval/num_examples"]["values"] == [500, 500]
    assert len(set(found["metrics"]["eval/loss"]["values"])) == 2


def probes(tmp_path, encoders):
    """Linear evaluations of runs with these changes, one seed each."""
    return [
        make_run(
            tmp_path / f"linear{seed}",
            seed,
            0.5,
            pretrained=make_run(tmp_path / f"encoder{seed}", seed, 0.5, **changes),
        )
        for seed, changes in enumerate(encoders)
    ]


def test_encoders_of_one_config_are_a_sample(tmp_path, capsys):
    seeds.main(probes(tmp_path, [{}, {}]))
    told = capsys.readouterr()
    assert "50.00 ± 0.00" in told.out and told.err == ""


@pytest.mark.parametrize("moved", [False, True])
def test_encoders_of_different_methods_are_no_sample(moved, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    losses = [{"loss": {"name": "supcon"}}, {"loss": {"name": "simclr"}}]
    runs = probes(tmp_path / "there", losses)
    if moved:
        (tmp_path / "there").rename(tmp_path / "here")
        runs = [one.replace("/there/", "/here/") for one in runs]
    run(*runs)
    told = capsys.readouterr()
    assert "differing: loss.name ('supcon', 'simclr')" in told.err
    assert told.err.count("\n") == 1 and told.out == ""


def test_a_trained_and_an_untrained_encoder_are_no_sample(tmp_path, capsys):
    (first,) = probes(tmp_path, [{}])
    second = make_run(tmp_path / "linear1", 1, 0.5, pretrained="random")
    run(first, second)
    assert "differing: pretrained (" in capsys.readouterr().err


def test_probes_that_share_an_encoder_are_told(tmp_path, capsys):
    encoder = make_run(tmp_path / "encoder", 0, 0.5)
    seeds.main(
        [make_run(tmp_path / f"s{s}", s, 0.5, pretrained=encoder) for s in (0, 1)]
    )
    told = capsys.readouterr()
    assert (
        f"2 runs share {encoder}; the deviation is not" in told.err
        and told.err.count("\n") == 1
    )
    assert "50.00 ± 0.00" in told.out
