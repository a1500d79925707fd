"""Mean and deviation over the seeds of one config, from finished workdirs.

    python -m supcon_jax.tools.seeds runs/digits_seed0 runs/digits_seed1
    python -m supcon_jax.tools.seeds runs/digits_seed* --out=runs/digits.json

Prints a Markdown table of the final metrics: mean, sample deviation and each seed's
value. Runs that are not finished, that differ in more than the seed or that repeat a seed
are refused; so are runs on encoders (`pretrained`) that differ in more. Where runs share an
encoder, a line says so: the deviation is not that of its training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from supcon_jax import storage
from supcon_jax.cli import one_line_errors
from supcon_jax.config.check import flatten
from supcon_jax.config.keys import RANDOM
from supcon_jax.metrics import is_result, is_share
from supcon_jax.run.workdir import differing_keys, read_config
from supcon_jax.writers import read_metrics

# A linear evaluation reads the encoder of its own seed, whose config is compared too.
OF_THE_SEED = ("seed", "pretrained")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, prints the table and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("workdirs", nargs="+", help="one for each seed")
    parser.add_argument("--out", help="a JSON file to write")
    options = parser.parse_args(arguments)
    with one_line_errors():
        summary = summarize(options.workdirs)
        if options.out:
            write(summary, options.out)
        print(markdown(summary))


def summarize(workdirs: list[str]) -> dict[str, Any]:
    """What the finished runs of one config gave.

    Args:
      workdirs: one for each seed, at least two.

    Returns:
      `{"workdirs": [...], "seeds": [...], "metrics": {name: {"mean": ...,
      "deviation": ..., "values": [...]}}}` in the order of the seeds; the deviation is
      that of a sample (n - 1).

    Raises:
      ValueError: what makes these runs no sample of one config, in one line.
    """
    if len(workdirs) < 2:
        raise ValueError(
            f"got one workdir, {workdirs[0]}; a deviation needs two or more"
        )
    configs = {}
    for workdir in workdirs:
        config = read_config(workdir)
        if config is None:
            raise ValueError(f"no run in {workdir}: it has no config.json")
        configs[workdir] = flatten(config)
    _check_one_config(configs)
    _check_encoders(configs)
    seeds: dict[int, str] = {}
    for workdir, config in configs.items():
        other = seeds.setdefault(config["seed"], workdir)
        if other != workdir or workdirs.count(workdir) > 1:
            raise ValueError(
                f"{other} and {workdir} have the same seed, {config['seed']}; give "
                "each run its own --config.seed"
            )
    finals = {workdir: _final_line(workdir) for workdir in workdirs}
    in_order = [seeds[seed] for seed in sorted(seeds)]
    metrics = {}
    for name in finals[in_order[0]]:
        values = [finals[w][name] for w in in_order if name in finals[w]]
        if is_result(name) and len(values) == len(in_order):
            metrics[name] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values),
                "values": values,
            }
    return {"workdirs": in_order, "seeds": sorted(seeds), "metrics": metrics}


def _check_one_config(configs: dict[str, dict[str, Any]]) -> None:
    """Refuses runs that differ in more than the seed and where things lie."""
    (first, ours), *others = configs.items()
    for workdir, theirs in others:
        differing = [
            f"{key} ({ours.get(key)!r}, {theirs.get(key)!r})"
            for key in differing_keys(ours, theirs, set(OF_THE_SEED))
        ]
        if differing:
            raise ValueError(
                f"{first} and {workdir} are runs of different configs; differing: "
                f"{', '.join(differing)}"
            )


def _check_encoders(configs: dict[str, dict[str, Any]]) -> None:
    """Refuses runs on models of different configs, and says where they share one."""
    named = {
        workdir: config.get("pretrained", "") for workdir, config in configs.items()
    }
    # Those of an untrained encoder, and those that begin with one of their own.
    (first, ours), *others = named.items()
    for workdir, theirs in others:
        if ours != theirs and {ours, theirs} & {"", RANDOM}:
            raise ValueError(
                f"{first} and {workdir} are runs of different configs; differing: "
                f"pretrained ({ours!r}, {theirs!r})"
            )
    if ours in ("", RANDOM):
        return
    used: dict[str, dict[str, Any]] = {}
    known = 0
    for workdir, pretrained in named.items():
        place, config = _used(workdir, pretrained)
        if config is None:
            print(
                f"warning: the run in {workdir} uses {pretrained}, which is not there and "
                "is not compared",
                file=sys.stderr,
            )
        elif place not in configs:  # one of that name may be beside itself
            used[place] = flatten(config)
            known += 1
    if used:
        _check_one_config(used)
        if len(used) < known:
            print(
                f"warning: {known} runs share {', '.join(used)}; the "
                "deviation is not that of their training",
                file=sys.stderr,
            )
        if len(used) > 1:
            _check_encoders(used)


def _used(workdir: str, pretrained: str) -> tuple[str, dict[str, Any] | None]:
    """Where the run that another one uses is, where it was or beside it; its config."""
    beside = storage.absolute(workdir).rpartition("/")[0]
    places = [
        storage.absolute(pretrained),
        storage.join(beside, storage.name(pretrained)),
    ]
    for place in places:
        if (config := read_config(place)) is not None:
            return place, config
    return places[0], None


def _final_line(workdir: str) -> dict[str, Any]:
    records = read_metrics(workdir)
    if not records or not records[-1].get("final"):
        reached = f"it reached step {records[-1]['step']}" if records else "no metrics"
        raise ValueError(
            f"the run in {workdir} is not finished ({reached}); the command that "
            "started it goes on with it"
        )
    return records[-1]


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a table; shares in percent."""
    seeds = ", ".join(str(seed) for seed in summary["seeds"])
    lines = [f"| metric | mean ± deviation | seeds {seeds} |", "|---|---|---|"]
    for name, found in summary["metrics"].items():
        shares = is_share(name)
        factor, text, unit = (100, "{:.2f}", " (%)") if shares else (1, "{:.5g}", "")
        mean, deviation, *each = (
            text.format(factor * value)
            for value in (found["mean"], found["deviation"], *found["values"])
        )
        lines.append(f"| {name}{unit} | {mean} ± {deviation} | {', '.join(each)} |")
    return "\n".join(lines)


def write(summary: dict[str, Any], path: str) -> None:
    """Writes the summary as JSON.

    Raises:
      ValueError: the file cannot be written.
    """
    try:
        storage.write(path, (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror} (--out)") from None


if __name__ == "__main__":
    main()
