"""A finished run as a folder for other programs and for model hubs.

    python -m supcon_jax.tools.export runs/linear_digits --out=exported

Writes `model.safetensors` (PyTorch's names), `model.stablehlo` (JAX alone runs it), with
jax2onnx `model.onnx`, a model card and `config.json`. Every file is read back and compared with
the run; where one differs nothing is left behind. docs/use.md says how each is loaded, and how
the folder gets onto a hub.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from supcon_jax import storage
from supcon_jax.checkpoint import saved_steps
from supcon_jax.cli import one_line_errors
from supcon_jax.inference.export import Written, export_files
from supcon_jax.inference.model import Model, load_model
from supcon_jax.inference.model_card import describe, write_card
from supcon_jax.logs import setup_logging
from supcon_jax.run.workdir import finished_metrics
from supcon_jax.tools.arguments import create_parser, model_changes, parse


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, exports and says what was written."""
    parser = create_parser(__doc__.splitlines()[0], takes_config=False)
    parser.add_argument("workdir", help="of a finished run")
    parser.add_argument("--out", required=True, help="the folder to make")
    options, changes = parse(parser, arguments)
    with one_line_errors():
        setup_logging()
        check_out(options.out)
        model = load_model(options.workdir, **model_changes(changes))
        check_finished(model.workdir)
        for line in export(model, pathlib.Path(options.out)):
            print(line)


def check_out(out: str) -> None:
    """Refuses a folder that is there already, and one in a bucket.

    Raises:
      ValueError: naming it.
    """
    if storage.is_remote(out):
        raise ValueError(f"got --out={out}; allowed: a folder on a local disk")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; remove it, or give another (--out)")


def check_finished(workdir: str) -> None:
    """Refuses a run that is not complete.

    Raises:
      ValueError: saying how far it has come.
    """
    if finished_metrics(workdir) is None:
        steps = saved_steps(workdir)
        reached = (
            f"its newest save is of step {steps[-1]}" if steps else "nothing saved"
        )
        raise ValueError(
            f"the run in {workdir} is not finished ({reached}); the command that began "
            "it goes on, and the end of it can be exported"
        )


def export(model: Model, out: pathlib.Path) -> list[str]:
    """Writes a folder, whole or not at all; returns what to say of it.

    Raises:
      ValueError: a file does not give what the run gives, or cannot be written.
    """
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        files = export_files(temporary, model)
        described = json.dumps(describe(model), indent=2) + "\n"
        (temporary / "config.json").write_text(described)
        card = write_card(model, out.name, files)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        os.rename(temporary, out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror} (--out)") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines = [as_text(out, written) for written in files]
    return [*lines, f"wrote {out}: README.md, config.json and the files above"]


def as_text(out: pathlib.Path, written: Written) -> str:
    """One line about a file."""
    if written.left_out:
        return f"{written.name:<18} left out: {written.left_out}"
    size = (out / written.name).stat().st_size / 1e6
    name, difference = max(written.differences.items(), key=lambda pair: pair[1])
    return (
        f"{written.name:<18} {size:,.1f} MB, as the run: the largest difference is "
        f"{difference:.1e} of the largest value ({name})"
    )


if __name__ == "__main__":
    main()
