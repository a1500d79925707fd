"""Runs a study: a grid of runs over several seeds, its table and its picture.

    python -m supcon_jax.tools.study studies/temperature.py --out=DIR
    python -m supcon_jax.tools.study studies/temperature.py --dry_run
    python -m supcon_jax.tools.study studies/temperature.py --scale=full \\
        --config.data.dir=DIR --out=DIR

Every stage of every cell is a process of its own. The same command goes on where it was
stopped, and may be started on any number of machines that share the folder: each takes the
next job that is free. Writes results.csv, results.md and results.png. `--dry_run` says what
it would run, and what that costs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax

from supcon_jax import storage
from supcon_jax.cli import one_line_errors
from supcon_jax.logs import setup_logging
from supcon_jax.study.costs import as_text, estimate
from supcon_jax.study.definition import SCALES, load_study
from supcon_jax.study.results import Results
from supcon_jax.study.runner import run_study
from supcon_jax.tools.arguments import PLACES


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, tells the costs and runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"--config.KEY=VALUE for every run, with KEY one of {', '.join(PLACES)}",
        allow_abbrev=False,
    )
    parser.add_argument("study", help="a file with get_study(scale), as in studies/")
    parser.add_argument("--out", help="folder; default: runs/study_<name of the file>")
    parser.add_argument("--scale", default="small", help=" | ".join(SCALES))
    parser.add_argument(
        "--dry_run", action="store_true", help="tell the costs, run nothing"
    )
    options, rest = parser.parse_known_args(arguments)
    with one_line_errors():
        # An accelerator is for the stages: some let one process in, and this one only counts.
        jax.config.update("jax_platforms", "cpu")
        setup_logging()
        places = _places(rest)
        study = load_study(options.study, options.scale)
        stem = pathlib.Path(options.study).stem
        full = "" if options.scale == "small" else f"_{options.scale}"
        if storage.is_remote(where := options.out or f"runs/study_{stem}{full}"):
            raise ValueError(f"got {where}; allowed: a folder on a disk (--out)")
        out = pathlib.Path(where).absolute()
        print(
            as_text(study, estimate(study, places, flops=options.dry_run), out),
            flush=True,
        )
        if options.dry_run:
            return
        done = run_study(study, out, places=places)
        print((out / "results.md").read_text(), flush=True)
        print(f"Written: {out}/results.md, results.csv, results.png")
        if not done:
            failed = Results(study, out).failures()
            print(
                f"error: {len(failed)} failed, {failed[0]}; the same command tries what "
                "failed again",
                file=sys.stderr,
            )
            sys.exit(1)


def _places(rest: list[str]) -> list[str]:
    """The `--config.KEY=VALUE` of a command line, of keys that say where things lie."""
    found = []
    for argument in rest:
        change = argument.removeprefix("--config.")
        if change == argument or change.partition("=")[0] not in PLACES:
            raise ValueError(
                f"got {argument}; allowed beside the study's own flags: "
                f"{', '.join(f'--config.{key}=' for key in PLACES)}; all else is in the "
                "study file"
            )
        found.append(change)
    return found


if __name__ == "__main__":
    main()
