"""supcon_jax's one program: python main.py --config=configs/digits.py

Flags, the processes of a multi-host job, and dispatch on `config.mode`; no logic.
"""

import difflib
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the config file.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; the same command on the same folder resumes. "
    "Default: runs/<name of the config file>.",
)


def main(_: list[str]) -> None:
    """Runs the mode that the config names; a refusal is one line and exit code 2."""
    # Imported here, so that --help and mistakes in flags answer at once.
    from supcon_jax import parallel
    from supcon_jax.linear_eval import linear_eval
    from supcon_jax.logs import setup_logging
    from supcon_jax.pretrain import pretrain

    modes = {"pretrain": pretrain, "linear_eval": linear_eval}
    config = _CONFIG.value
    try:
        mode = config.get("mode")
        if mode not in modes:
            raise ValueError(
                f"got mode={mode!r}; allowed: {', '.join(modes)} (--config.mode)"
            )
        parallel.initialize()
        setup_logging()
        modes[mode](config, _WORKDIR.value or default_workdir())
    except (ValueError, FloatingPointError) as error:
        _refuse(error, code=2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        _refuse("interrupted; the same command goes on from the last save", code=130)


def default_workdir() -> str:
    """runs/<config stem>, without a timestamp: every host and every rerun agree."""
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    path, _, variant = filename.partition(":")
    stem = pathlib.PurePath(path).stem
    return f"runs/{stem}_{variant}" if variant else f"runs/{stem}"


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what is wrong with it is told in one line."""
    configs = sorted(str(path) for path in pathlib.Path("configs").glob("[!_]*.py"))
    configs = [path for path in configs if path != "configs/common.py"]
    for argument in argv[1:]:
        if argument.startswith(("--config=", "-config=")):
            path = argument.partition("=")[2].partition(":")[0]
            if not pathlib.Path(path).is_file():
                nearest = difflib.get_close_matches(path, configs, n=3) or configs
                _refuse(f"no config file {path!r}; there are: {', '.join(nearest)}")
    try:
        remaining = flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        # A config file that raises is quoted with its traceback; its last line says it.
        last = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        _refuse(_unknown_key(argv) or last)
    if len(remaining) > 1:
        _refuse(f"unexpected argument {remaining[1]!r}; options start with --")
    if _CONFIG.value is None:
        _refuse(f"which config? --config=FILE, one of: {', '.join(configs)}")
    return remaining


def _unknown_key(argv: list[str]) -> str | None:
    """What is wrong with the first override that names no key."""
    from supcon_jax.config import KEYS, unknown_key

    for argument in argv[1:]:
        key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and key not in KEYS:
            return unknown_key(key)
    return None


def _refuse(message: object, *, code: int = 2) -> None:
    line = " ".join(str(message).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
