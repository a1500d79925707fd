"""Finds where the records of a TFDS dataset begin, once, and keeps it in a file.

    python -m supcon_jax.tools.index --config=configs/supcon_r50.py \\
        --config.data.dir=DIR

The first run on a large dataset does the same. The file lies beside the shards or, where
that folder cannot be written to, in the user's cache (docs/data.md).
"""

from __future__ import annotations

from supcon_jax.cli import one_line_errors
from supcon_jax.config.loading import load_config
from supcon_jax.data.tfds import index_tfds
from supcon_jax.logs import setup_logging
from supcon_jax.tools.arguments import create_parser, parse


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and makes what is missing."""
    parser = create_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--rebuild", action="store_true", help="make it anew where there is one"
    )
    options, changes = parse(parser, arguments)
    setup_logging()
    with one_line_errors():
        data = load_config(options.config, changes).data
        for split, records in index_tfds(
            data.name, data.dir, rebuild=options.rebuild
        ).items():
            print(f"{split}: {records:,} records")


if __name__ == "__main__":
    main()
