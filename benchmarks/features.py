"""Whether the extraction of features is limited by the encoder, or by what feeds it.

    python -m benchmarks.features --data_dir=DIR      # CIFAR-10, a minute on a CPU
    python -m benchmarks.features                     # noise in its shape

`Predictor.embed` over the test images against the same compiled encoder on batches that
lie on the device already. Both take turns within one run; of each the fastest turn counts, in
time and in CPU time, since other work on the machine can only make a turn slower.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.step_runs import describe_machine, table
from configs import common
from supcon_jax import parallel
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import eval_batches, load_small
from supcon_jax.data.sources import ArraySource, Source
from supcon_jax.run.batches import create_predictor
from supcon_jax.run.plan import create_plan, init_encoder


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="TFDS data with CIFAR-10")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--encoder", default="resnet8")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe_machine(), "\n")
    print(extraction_table(options))


def extraction_table(options: argparse.Namespace) -> str:
    """Images a second of both, their ratio, and the memory of the process."""
    config = common.get_config()
    config.mode, config.pretrained = "linear_eval", "random"
    common.set_cifar(config, classes=10)
    config.batch_size = options.batch
    config.encoder.name, config.encoder.stem = options.encoder, options.stem
    config.encoder.dtype = "auto"
    mesh = parallel.create_mesh()
    plan = create_plan(config, mesh, num_classes=10, num_examples=options.images)
    variables = {"encoder": jax.jit(lambda: init_encoder(plan))()}
    source = images_of(options)
    predictor = create_predictor(config, mesh, plan.modules.encoder, None)
    on_device = [
        parallel.to_global(batch, mesh)
        for batch in eval_batches(
            source, batch_size=options.batch, image_size=32, resize=32
        )
    ]

    def encode() -> None:
        """All batches one after the other, and nothing of them is fetched."""
        outputs = [predictor._embed(variables, batch) for batch in on_device]
        jax.block_until_ready(outputs)

    turns: dict[str, Callable[[], object]] = {
        "embed": lambda: predictor.embed(variables, source),
        "encoder": encode,
    }
    before = peak_mb()
    turns["embed"]()
    after = peak_mb()
    turns["encoder"]()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(options.rounds):
        for name in list(turns)[:: 1 if number % 2 else -1]:
            start, cpu = time.perf_counter(), time.process_time()
            turns[name]()
            seconds[name].append(
                (time.perf_counter() - start, time.process_time() - cpu)
            )
    # The fastest of each: other work on the machine can only make a turn slower.
    fastest = {
        name: [min(values) for values in zip(*turns, strict=True)]
        for name, turns in seconds.items()
    }
    rates = [f"{source.num_examples / wall:,.0f}" for wall, _ in fastest.values()]
    ratios = [
        alone / whole
        for alone, whole in zip(fastest["encoder"], fastest["embed"], strict=True)
    ]
    header = [
        "encoder",
        "`embed`, images/s",
        "encoder alone, images/s",
        "`embed` / encoder, time",
        "CPU time",
        "peak memory, MB",
        "of it by the first `embed`",
    ]
    row = [
        f"{options.encoder}, {options.stem} stem",
        *rates,
        *(f"{100 * ratio:.1f} %" for ratio in ratios),
        f"{peak_mb():,.0f}",
        f"{after - before:,.0f}",
    ]
    return table(header, [row])


def images_of(options: argparse.Namespace) -> Source:
    """So many test images of CIFAR-10, or noise."""
    if options.data_dir:
        source = load_small(open_source("cifar10", "test", dir=options.data_dir), 32)
        return source.take_rows(np.arange(min(options.images, source.num_examples)))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (options.images, 32, 32, 3), np.uint8)
    return ArraySource(images, np.zeros(options.images, np.int32), num_classes=10)


def peak_mb() -> float:
    """The most memory that this process has had."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
