"""Every config file and every variant that it has, for the tests that go through all."""

import importlib
import inspect
import pathlib
import re

from configs import common

FOLDER = pathlib.Path(common.__file__).parent
FILES = sorted(p.stem for p in FOLDER.glob("[!_]*.py") if p.stem != "common")


def load(stem, variant=""):
    get_config = importlib.import_module(f"configs.{stem}").get_config
    return get_config(variant) if variant else get_config()


def load_named(name):
    """The config of `FILE` or `FILE:VARIANT`, as --config takes it."""
    file, _, variant = name.partition(":")
    return load(pathlib.PurePath(file).stem, variant)


def variants(stem):
    """The names that a config file knows, the default "" first.

    They are those that its refusal of an unknown one lists.
    """
    get_config = importlib.import_module(f"configs.{stem}").get_config
    if not inspect.signature(get_config).parameters:
        return [""]
    try:
        get_config("no such variant")
    except ValueError as refusal:
        return ["", *re.findall(r"'(\w+)'", str(refusal).partition("available:")[2])]
    raise AssertionError(f"{stem} takes any variant")


ALL = [(stem, variant) for stem in FILES for variant in variants(stem)]
