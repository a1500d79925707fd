"""The command line of tools that take a config, with changes, as main.py does."""

from __future__ import annotations

import argparse
import os

from ml_collections import ConfigDict

from supcon_jax import storage
from supcon_jax.config.loading import apply_changes

# Keys that say where the data of a run are, and change nothing else.
PLACES = ("data.dir", "data.root", "data.skip_errors")
# What may be changed of a run that is used, and what `load_model` calls it.
OF_MODEL = {
    "data.dir": "data_dir",
    "data.root": "data_root",
    "data.eval_split": "calibration_split",
}


def create_parser(
    description: str, *, takes_config: bool = True
) -> argparse.ArgumentParser:
    """A parser with `--config`; a tool adds what it takes beside it.

    Without `takes_config` the config is that of a run, which the tool is given.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="--config.KEY=VALUE changes a config key, as for main.py",
        allow_abbrev=False,
    )
    if takes_config:
        parser.add_argument("--config", required=True, help="FILE or FILE:VARIANT")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the changes of the config as `KEY=VALUE`."""
    options, rest = parser.parse_known_args(arguments)
    changes = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    if len(changes) < len(rest):
        parser.error(f"unexpected {' '.join(a for a in rest if '--config.' not in a)}")
    return options, changes


def change_places(config: ConfigDict, changes: list[str]) -> None:
    """Makes changes in the config of a run that has been: where its data are now.

    Raises:
      ValueError: another key, of which the run has its own value.
    """
    for change in changes:
        if change.partition("=")[0] not in PLACES:
            raise ValueError(
                f"got --config.{change}; allowed: {', '.join(PLACES)}, the run has all "
                "else"
            )
    if changes:
        apply_changes(config, changes)


def model_changes(changes: list[str]) -> dict[str, str]:
    """`KEY=VALUE` changes as arguments of `supcon_jax.load_model`.

    Raises:
      ValueError: another key, of which the run has its own value.
    """
    found = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in OF_MODEL:
            raise ValueError(
                f"got --config.{change}; allowed: {', '.join(OF_MODEL)}, the run has all "
                "else"
            )
        found[OF_MODEL[key]] = value
    return found


def check_out(out: str) -> None:
    """Refuses a file whose folder is not there, before anything is computed for it.

    Raises:
      ValueError: naming the folder.
    """
    folder = os.path.dirname(os.path.abspath(out))
    if not storage.is_remote(out) and not storage.is_dir(folder):
        raise ValueError(f"cannot write {out}: no folder {folder} (--out)")
