"""Where config and study files are: here, in the checkout, or in the installed package.

A wheel holds configs/ and studies/ inside supcon_jax/, so that they take no names of their
own among the installed packages. Files that say `from configs import common` find it in all
three places.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_FOLDERS = ("configs", "studies")
_INSTALLED = (_PACKAGE / "configs").is_dir()
# What has the folders beside the code: the installed package, or the checkout.
HOME = _PACKAGE if _INSTALLED else _PACKAGE.parent
# How the program is started, in the commands that are told to a user.
PROGRAM = ("supcon-jax",) if _INSTALLED else ("python", "main.py")


def find_file(name: str) -> pathlib.Path | None:
    """A config or study file: as named, or else the one that comes with the code.

    Args:
      name: a path, without a variant: "configs/digits.py".
    """
    for path in (pathlib.Path(name), HOME / name):
        if path.is_file():
            return path
    return None


def config_files() -> list[str]:
    """The configs of this folder, or those that come with the code where there are none."""
    for folder in (pathlib.Path(), HOME):
        found = sorted(path.name for path in folder.glob("configs/[!_]*.py"))
        names = [f"configs/{name}" for name in found if name != "common.py"]
        if names:
            return names
    return []


def make_importable() -> None:
    """Lets config and study files import what they share, `from configs import common`.

    A folder of that name here comes first, then the checkout's, then the installed one.
    """
    here = str(pathlib.Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if not _INSTALLED:
        if str(HOME) not in sys.path:
            sys.path.append(str(HOME))
        return
    for name in _FOLDERS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = importlib.import_module(f"supcon_jax.{name}")
