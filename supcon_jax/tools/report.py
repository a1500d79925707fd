"""One self-contained HTML page of one or several runs: numbers, curves, pictures.

    python -m supcon_jax.tools.report runs/digits runs/linear_digits runs/evaluate_digits
    python -m supcon_jax.tools.report runs/a runs/b --out=a_and_b.html

Runs of any mode; several are compared. What a run has not left is not shown, and the page
says what would make it. Where the data have moved, `--config.data.dir=DIR` or
`--config.data.root=DIR` says where they are; without them there are no pictures.
"""

from __future__ import annotations

from supcon_jax import storage
from supcon_jax.cli import one_line_errors
from supcon_jax.logs import setup_logging
from supcon_jax.page.document import page
from supcon_jax.page.pictures import take_pictures
from supcon_jax.page.records import read_records
from supcon_jax.run.opening import setup_compilation_cache
from supcon_jax.tools.arguments import change_places, check_out, create_parser, parse


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, gathers what the runs left and writes the page."""
    parser = create_parser(__doc__.splitlines()[0], takes_config=False)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument("--out", default="report.html", help="the page to write")
    options, changes = parse(parser, arguments)
    with one_line_errors():
        setup_logging()
        check_out(options.out)
        report(options.workdirs, options.out, changes=changes)


def report(workdirs: list[str], out: str, *, changes: list[str] | None = None) -> None:
    """Writes the page of some runs.

    Args:
      workdirs: of the runs, in the order in which they are shown.
      out: the file to write.
      changes: `data.dir=DIR` and the like, where data have moved.

    Raises:
      ValueError: a workdir holds no run, a change is not allowed, or the file cannot be
        written.
    """
    runs = read_records(workdirs)
    for run in runs:
        change_places(run.config, changes or [])
    setup_compilation_cache(enabled=all(run.config.compilation_cache for run in runs))
    pictures = take_pictures(runs)
    content = page(runs, pictures).encode()
    try:
        storage.write(out, content)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror} (--out)") from None
    for problem in pictures.problems:
        print(f"warning: {problem}")
    print(f"wrote {out}: {len(runs)} runs, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
