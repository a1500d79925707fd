"""A config from its file, with changes, as the program reads it from its flags."""

from __future__ import annotations

import ast
import runpy

from ml_collections import ConfigDict

from supcon_jax.config.check import check_config, unknown_key
from supcon_jax.config.files import find_file, make_importable
from supcon_jax.config.keys import KEYS


def load_config(name: str, changes: list[str]) -> ConfigDict:
    """The config of a file, `FILE` or `FILE:VARIANT`, with `KEY=VALUE` changes.

    Raises:
      ValueError: no such file, key or value.
    """
    file, _, variant = name.partition(":")
    path = find_file(file)
    if path is None:
        raise ValueError(f"no config file {file!r} (--config)")
    make_importable()
    module = runpy.run_path(str(path))
    config = module["get_config"](*([variant] if variant else []))
    apply_changes(config, changes)
    return config


def apply_changes(config: ConfigDict, changes: list[str]) -> None:
    """Changes a config by `KEY=VALUE` each, and checks it.

    Raises:
      ValueError: no such key or value.
    """
    for change in changes:
        key, _, text = change.partition("=")
        if key not in KEYS:
            raise ValueError(unknown_key(key))
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot set --config.{change}: {error}") from None
    check_config(config)
