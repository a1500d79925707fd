"""The program: flags, the processes of a multi-host job, dispatch on `config.mode`; no logic.

python main.py --config=configs/digits.py       # in a checkout
supcon-jax --config=configs/digits.py           # where the package is installed
"""

import atexit
import contextlib
import difflib
import os
import pathlib
import signal
import sys
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from supcon_jax.config.files import config_files, find_file, make_importable

# What launchers say to processes of a job; a mistake in a single one's flags is told before
# the second that importing JAX takes.
_OF_A_JOB = (
    "JAX_COORDINATOR_ADDRESS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SKYPILOT_NUM_NODES",
    "SLURM_STEP_NODELIST",
    "TPU_WORKER_HOSTNAMES",
    "WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
)
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
    from supcon_jax import hosts
    from supcon_jax.cli import one_line_errors
    from supcon_jax.evaluate import evaluate
    from supcon_jax.finetune import finetune
    from supcon_jax.linear_eval import linear_eval
    from supcon_jax.logs import setup_logging
    from supcon_jax.pretrain import pretrain
    from supcon_jax.robustness import robustness

    modes = {
        "pretrain": pretrain,
        "linear_eval": linear_eval,
        "finetune": finetune,
        "evaluate": evaluate,
        "robustness": robustness,
    }
    config = _CONFIG.value
    with one_line_errors():
        setup_logging()
        hosts.initialize()
        mode = config.get("mode")
        if mode not in modes:
            raise ValueError(
                f"got mode={mode!r}; allowed: {', '.join(modes)} (--config.mode)"
            )
        modes[mode](config, _WORKDIR.value or default_workdir())


def default_workdir() -> str:
    """runs/<config stem>, without a timestamp: every host and every rerun agree."""
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    path, _, variant = filename.partition(":")
    stem = pathlib.PurePath(path).stem
    return f"runs/{stem}_{variant}" if variant else f"runs/{stem}"


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what is wrong with it is told in one line."""
    if {"--help", "-h", "-help"} & {*argv[1:]}:
        module = flags.FLAGS.find_module_defining_flag("workdir")
        print(f"{__doc__}\n{flags.FLAGS.module_help(module)}")
        print("  --config.KEY=VALUE changes a key; all of them: configs/common.py")
        sys.exit(0)
    make_importable()
    argv = _with_config_found(argv)
    configs = config_files()
    try:
        remaining = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # A config file that raises is quoted with its traceback; its last line says it.
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        _refuse(_unknown_key(argv) or last[0].removeprefix("ValueError: "))
    except Exception as error:  # configs are code, and theirs may raise anything
        _refuse(f"the config file fails: {type(error).__name__}: {error} (--config)")
    if len(remaining) > 1:
        _refuse(f"unexpected argument {remaining[1]!r}; options start with --")
    if _CONFIG.value is None:
        _refuse(f"which config? --config=FILE, one of: {', '.join(configs)}")
    return remaining


def _with_config_found(argv: list[str]) -> list[str]:
    """The arguments with --config=FILE made a file that exists, here or beside the code."""
    argv = list(argv)
    for place, argument in enumerate(argv[1:], start=1):
        name, equals, value = argument.lstrip("-").partition("=")
        if name != "config" or not argument.startswith("-"):
            continue
        if not equals:  # --config FILE
            if place + 1 == len(argv):
                _refuse(f"--config needs a file, one of: {', '.join(config_files())}")
            value = argv.pop(place + 1)
        file, colon, variant = value.partition(":")
        found = find_file(file)
        if found is None:
            configs = config_files()
            nearest = difflib.get_close_matches(file, configs, n=3) or configs
            _refuse(f"no config file {file!r}; there are: {', '.join(nearest)}")
        argv[place] = f"--config={found}{colon}{variant}"
        break
    return argv


def _unknown_key(argv: list[str]) -> str | None:
    """What is wrong with the first override that names no key."""
    from supcon_jax.config.check import unknown_key
    from supcon_jax.config.keys import KEYS

    for argument in argv[1:]:
        key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and key not in KEYS:
            return unknown_key(key)
    return None


def _refuse(message: object, *, code: int = 2) -> NoReturn:
    line = " ".join(str(message).split())
    if any(name in os.environ for name in _OF_A_JOB):
        _refuse_in_all(line, code)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _refuse_in_all(line: str, code: int) -> None:
    """Ends the other processes of the job too, which would wait for this one."""
    from supcon_jax import hosts

    with contextlib.suppress(ValueError):  # nobody is found: it ends alone
        hosts.initialize()
    hosts.leave(line, code)


def _stopped_early(*_: object) -> None:
    """A preemption while the program is still being loaded: there is nothing to save."""
    print("stopped before anything was saved; the same command starts anew", flush=True)
    code = os.environ.get("SUPCON_STOPPED_CODE", "0")  # supcon_jax/run/stop.py
    os._exit(int(code) if code.isdigit() and int(code) < 256 else 0)


def _end(code: int) -> NoReturn:
    """Ends the process once all that is registered for its end has run.

    Threads of native libraries may still be in Python code here. The interpreter's own end
    would take it away under them, and abort the process instead of giving it its code.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run() -> NoReturn:
    """The command: ends the process with the exit code."""
    # What native libraries have to say comes as errors too, worded for the user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    signal.signal(signal.SIGTERM, _stopped_early)
    try:
        app.run(main, flags_parser=parse_flags)
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else 0)
    _end(0)


if __name__ == "__main__":
    run()
