"""SupCon against cross-entropy on CIFAR-10 with ResNet-18: what fits into some minutes.

    python -m benchmarks.cifar10 --minutes=25                # TFDS's CIFAR-10
    python -m benchmarks.cifar10 --minutes=25 --npz=FILE     # arrays, or encoded images
    python -m benchmarks.cifar10 --minutes=10 --seeds=1 --epochs=75

Trains the `:gpu` configs, each stage through main.py in a process of its own: SupCon and
its linear evaluation in one half of the minutes, cross-entropy in the other, seed after
seed. The configs, or --epochs, fix the epochs, so the minutes decide only how far this
call comes. What is not finished then is stopped as by SIGTERM and saved, and the next call
with the same --folder goes on. Prints a Markdown table and writes it to the folder.

An .npz file holds `train_images`, `train_labels`, `test_images`, `test_labels`, or in the
place of images `train_bytes`, encoded images end to end, and `train_sizes`, their bytes.
--toy trains a ResNet-8 of four channels for a few steps: whether it works, not how well.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs import cross_entropy_cifar10

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
EPOCHS = cross_entropy_cifar10.get_config("gpu").epochs
SUPCON, CROSS_ENTROPY = "SupCon + linear", "cross-entropy"
# A stage is not started for less time than this.
LEAST_S = 5.0
TOY = (
    "--config.encoder.name=resnet8",
    "--config.encoder.width=0.0625",
    "--config.encoder.dtype=float32",
    "--config.batch_size=16",
)
TOY_TRAINING = (
    "--config.total_steps=6",
    "--config.log_every=1",
    "--config.eval_every=0",
    "--config.checkpoint_every=0",
    "--config.optimizer.warmup_epochs=0",
    "--config.knn.bank=32",
)


class Stage(NamedTuple):
    """One command of main.py.

    Attributes:
      workdir: of its run.
      config: file and variant below configs/.
      flags: what differs from the config.
    """

    workdir: pathlib.Path
    config: str
    flags: tuple[str, ...]

    def last(self) -> dict:
        """The newest line of the run's metrics; {} where there is none."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def finished(self) -> bool:
        """Whether the run has its final metrics."""
        return bool(self.last().get("final"))


def build_stages(
    folder: pathlib.Path,
    seeds: int,
    data: tuple[str, ...],
    *,
    toy: bool,
    epochs: float = EPOCHS,
) -> dict[str, list[list[Stage]]]:
    """Method -> for each seed, its stages in order."""
    network = TOY if toy else ()
    length = TOY_TRAINING if toy else (f"--config.epochs={epochs}",)
    training = (*network, *length)
    found: dict[str, list[list[Stage]]] = {SUPCON: [], CROSS_ENTROPY: []}
    for seed in range(seeds):
        flags = (*data, f"--config.seed={seed}")
        supcon, linear, baseline = (
            folder / f"{name}_seed{seed}"
            for name in ("supcon", "linear", "cross_entropy")
        )
        found[SUPCON].append(
            [
                Stage(supcon, "supcon_cifar10.py:gpu", (*flags, *training)),
                Stage(
                    linear,
                    "linear_cifar10.py:gpu",
                    (*flags, *network, f"--config.pretrained={supcon}"),
                ),
            ]
        )
        config = "cross_entropy_cifar10.py:gpu"
        found[CROSS_ENTROPY].append([Stage(baseline, config, (*flags, *training))])
    return found


def run_stage(stage: Stage, seconds: float) -> None:
    """Runs a stage until it ends, or until the time is over and it has saved.

    Raises:
      SystemExit: it failed.
    """
    command = [sys.executable, "main.py", f"--config=configs/{stage.config}"]
    command += [f"--workdir={stage.workdir}", *stage.flags]
    print(f"{stage.workdir.name}: up to {seconds / 60:.1f} min", flush=True)
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code:
        raise SystemExit(f"{stage.workdir.name} failed with exit code {code}")


def train(
    methods: dict[str, list[list[Stage]]], minutes: float, folder: pathlib.Path
) -> None:
    """Each method gets half of the minutes; what one leaves, the other takes."""
    start = time.monotonic()
    for method, share in ((SUPCON, 0.5), (CROSS_ENTROPY, 1.0), (SUPCON, 1.0)):
        deadline = start + 60 * minutes * share
        for stage in (stage for seed in methods[method] for stage in seed):
            left = deadline - time.monotonic()
            if left < LEAST_S:
                break
            if stage.finished():
                continue
            began = time.monotonic()
            run_stage(stage, left)
            note_seconds(folder, stage, time.monotonic() - began)
            if not stage.finished():
                break  # the next one may need it


def note_seconds(folder: pathlib.Path, stage: Stage, seconds: float) -> None:
    """Adds to what a stage has taken over all calls, starting and compiling included."""
    path = folder / "seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[stage.workdir.name] = known.get(stage.workdir.name, 0.0) + seconds
    path.write_text(json.dumps(known, indent=2) + "\n")


def table(
    methods: dict[str, list[list[Stage]]],
    folder: pathlib.Path,
    device: str,
    epochs: float = EPOCHS,
) -> str:
    """Markdown: what each method has reached."""
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    lines = [
        "| method | epochs | top-1 of each seed (%) | mean ± deviation | minutes | device |",
        "|---|---|---|---|---|---|",
    ]
    for method, seeds in methods.items():
        done = [stages for stages in seeds if stages[-1].finished()]
        top1 = [100 * stages[-1].last()["eval/top1"] for stages in done]
        each = ", ".join(f"{value:.2f}" for value in top1) or "-"
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        mean = f"{statistics.mean(top1):.2f}{spread}" if top1 else "-"
        reached = ", ".join(
            f"{stages[0].last().get('epoch', 0):.0f}" for stages in seeds
        )
        taken = ", ".join(
            f"{sum(seconds.get(s.workdir.name, 0.0) for s in stages) / 60:.1f}"
            for stages in seeds
        )
        lines.append(
            f"| {method} | {reached} of {epochs:g} | {each} | {mean} | {taken} "
            f"| {device} |"
        )
    return "\n".join(lines) + "\n"


def device_name() -> str:
    """The device that a process of its own sees; this one must not take its memory."""
    command = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def arrays_file(npz: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The .npz file itself, or where its images are encoded one with arrays.

    Raises:
      SystemExit: it holds neither.
    """
    with np.load(npz) as file:
        if "train_images" in file:
            return npz
        if "train_bytes" not in file:
            raise SystemExit(
                f"{npz} holds {', '.join(file)}; wanted: train_images, or train_bytes and "
                "train_sizes (--npz)"
            )
        path = folder / "arrays.npz"
        if path.exists():
            return path
        arrays = {}
        for split in ("train", "test"):
            data = file[f"{split}_bytes"].tobytes()
            ends = np.cumsum(file[f"{split}_sizes"])
            arrays[f"{split}_images"] = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
                    for start, end in zip([0, *ends[:-1]], ends, strict=True)
                ]
            )
            arrays[f"{split}_labels"] = file[f"{split}_labels"]
    unfinished = folder / "unfinished.npz"
    np.savez(unfinished, **arrays)
    unfinished.rename(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Trains what fits into the time and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--folder", default="runs/cifar10_gpu", help="of all runs")
    parser.add_argument("--npz", help="images in a file instead of TFDS")
    parser.add_argument("--data_dir", default="", help="TFDS data directory")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of both methods")
    parser.add_argument("--toy", action="store_true", help="a few steps on a CPU")
    options = parser.parse_args(arguments)
    folder = pathlib.Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data: tuple[str, ...] = (f"--config.data.dir={options.data_dir}",)
    if options.npz:
        root = arrays_file(pathlib.Path(options.npz).resolve(), folder)
        data = ("--config.data.name=arrays", f"--config.data.root={root}")
    methods = build_stages(
        folder, options.seeds, data, toy=options.toy, epochs=options.epochs
    )
    device = device_name()
    train(methods, options.minutes, folder)
    found = table(methods, folder, device, options.epochs)
    (folder / "table.md").write_text(found)
    print(f"\n{found}")


if __name__ == "__main__":
    main()
