"""What pairs of views give to the gradient, by their cosine: section 3.2.3 on a real run.

    python -m supcon_jax.tools.gradients runs/digits
    python -m supcon_jax.tools.gradients runs/digits --steps=0,100,405 --batches=8

The same batches of a contrastive run's training data go through its encoder and head as
they were at some steps: by default as they began and as they are now. For L_out and L_in
it draws the length of each pair's part of the gradient with respect to the anchor's
projection (before it is normalised), prints its mean by the cosine of the pair, and writes
all numbers as CSV beside the picture. The temperature is the run's; all other views are in
the denominator.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from supcon_jax import builders, parallel, storage
from supcon_jax.checkpoint import saved_steps
from supcon_jax.cli import one_line_errors
from supcon_jax.config.check import config_of
from supcon_jax.data.identity import identify
from supcon_jax.data.pipeline import on_host
from supcon_jax.evaluation.gradients import (
    CosineBin,
    by_cosine,
    hard_and_easy,
    pair_gradients,
)
from supcon_jax.figures import plot_gradients
from supcon_jax.logs import progress, setup_logging
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.pretrained.model import load_state
from supcon_jax.run.batches import build_sampler, build_train_batches
from supcon_jax.run.opening import setup_compilation_cache
from supcon_jax.run.plan import Plan, create_plan
from supcon_jax.run.splits import open_sources
from supcon_jax.run.workdir import read_config, read_facts, refuse_other_data
from supcon_jax.steps.state import TrainState
from supcon_jax.tools.arguments import change_places, check_out, create_parser, parse

logger = logging.getLogger(__name__)
KINDS = ("positive", "negative")
LOSSES = {"L_out": "outside", "L_in": "inside"}
# ("positive" or "negative", name of a loss) -> cosines and lengths [2, pairs]
Parts = dict[tuple[str, str], np.ndarray]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures, draws and prints."""
    parser = create_parser(__doc__.splitlines()[0], takes_config=False)
    parser.add_argument("workdir", metavar="WORKDIR", help="of a contrastive run")
    parser.add_argument(
        "--steps",
        default="early,late",
        help="numbers of kept checkpoints, 0 (the initial state), early, late",
    )
    parser.add_argument("--batches", type=int, default=4, help="of the training data")
    parser.add_argument(
        "--images", type=int, default=256, help="most images of a batch that are taken"
    )
    parser.add_argument("--out", help="the picture; WORKDIR/figures/gradients.png")
    options, changes = parse(parser, arguments)
    with one_line_errors():
        setup_logging()
        workdir = options.workdir
        for name in ("batches", "images"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be 1 or more")
        config = read_run(workdir)
        change_places(config, changes)
        steps = choose_steps(workdir, options.steps)
        out = options.out or storage.join(workdir, "figures", "gradients.png")
        if options.out:
            check_out(out)
        elif not storage.is_remote(out):
            os.makedirs(os.path.dirname(out), exist_ok=True)
        setup_compilation_cache(enabled=config.compilation_cache)
        found = measure(
            workdir, config, steps, batches=options.batches, images=options.images
        )
        write(found, out)


def read_run(workdir: str) -> ConfigDict:
    """The config of a run that has projections.

    Raises:
      ValueError: there is no run, or it has none.
    """
    saved = read_config(workdir)
    if saved is None:
        raise ValueError(f"no run in {workdir}: it has no config.json")
    config = config_of(saved)
    contrastive = OBJECTIVES[config.loss.name].contrastive
    if config.mode != "pretrain" or not contrastive:
        raise ValueError(
            f"the run in {workdir} has no projections: its mode is {config.mode} and its "
            f"loss {config.loss.name}; name the workdir of a contrastive pretraining run"
        )
    return config


def choose_steps(workdir: str, chosen: str) -> list[int]:
    """The steps that `--steps` names, in order.

    "early" is the first checkpoint, if it is of the first tenth of the run, and else 0, the
    initial state, which any run has; "late" is the newest one.

    Raises:
      ValueError: nothing is saved, or not that step.
    """
    saved = saved_steps(workdir)
    if not saved:
        raise ValueError(f"the run in {workdir} has saved nothing yet")
    early = saved[0] if saved[0] <= saved[-1] / 10 else 0
    steps = set()
    for name in chosen.split(","):
        step = {"early": early, "late": saved[-1]}.get(name.strip())
        if step is None and name.strip().isdecimal():
            step = int(name)
        if step is None or step not in (0, *saved):
            raise ValueError(
                f"got --steps={chosen}; {workdir} has {', '.join(map(str, saved))}, and 0, "
                "the initial state; early and late name two of them"
            )
        steps.add(step)
    return sorted(steps)


def measure(
    workdir: str, config: ConfigDict, steps: list[int], *, batches: int, images: int
) -> dict[str, Parts]:
    """Cosine of every pair and length of its part, at each step; title -> parts.

    Args:
      workdir: of the run.
      config: of the run.
      steps: saved ones, or 0.
      batches: from the first of the run on.
      images: most images of a batch.

    Raises:
      ValueError: data or checkpoints cannot be used.
    """
    # One batch on one device; none of these changes what a view or a state is.
    config.batch_size = min(config.batch_size, images)
    config.microbatch_size, config.encoder.batch_norm_devices = 0, 0
    config.data.lanes = 0
    train, evaluation = open_sources(config)
    refuse_other_data(
        workdir, {"train": identify(train)}, read_facts(workdir).get("data", {})
    )
    if train.label_sets is not None:
        raise ValueError(
            f"the images of {workdir} show several classes each, and what a pair gives to "
            "the gradient is known for one class an image alone"
        )
    plan = create_plan(
        config,
        parallel.create_mesh(jax.devices()[:1]),
        num_classes=train.num_classes,
        num_examples=train.num_examples,
        whole_images=not on_host(train),
    )
    stream = build_train_batches(config, train, build_sampler(config, train))
    taken = list(itertools.islice(stream, batches))
    project = build_projection(plan)
    supervised = OBJECTIVES[config.loss.name].uses_labels
    init = jax.jit(plan.init)
    found = {}
    for step in steps:
        # The seed gives the initial state.
        state = load_state(workdir, plan, step=step) if step else init()
        parts: dict[tuple[str, str], list[np.ndarray]] = {}
        for batch in progress(taken, total=len(taken), label=f"step {step}"):
            projections = np.asarray(project(state, batch))
            own = -1 - np.arange(len(batch["label"]))  # an image without a label
            labels = batch["label"] if supervised else own
            groups = np.repeat(np.where(labels < 0, own, labels), config.data.views)
            for loss, summation in LOSSES.items():
                pairs = pair_gradients(
                    projections,
                    groups,
                    temperature=config.loss.temperature,
                    summation=summation,
                )
                for kind in KINDS:
                    among = getattr(pairs, kind)
                    values = np.stack([pairs.cosine[among], pairs.norm[among]])
                    parts.setdefault((kind, loss), []).append(values)
        title = f"step {step:,}" if step else "initial state"
        found[title] = {
            key: np.concatenate(values, axis=1) for key, values in parts.items()
        }
    return found


def build_projection(plan: Plan) -> Callable[[TrainState, Any], jax.Array]:
    """`(state, batch) -> [B V, D]`: projections as the loss of a step sees them.

    BatchNorm has the statistics of the batch, as in training.
    """
    config, mesh = plan.config, plan.mesh
    encoder = builders.build_encoder(config, plan.platform)
    head = OBJECTIVES[config.loss.name].build_head(
        config, plan.num_classes, axis_name=None
    )
    augment = builders.build_augmentation(config, mesh, whole_images=plan.whole_images)

    @jax.jit
    def project(state: TrainState, batch: Any) -> jax.Array:
        images = augment(batch["image"], batch["id"])
        x = images.reshape(-1, *images.shape[2:])
        for name, module in (("encoder", encoder), ("head", head)):
            variables = {
                "params": state.params[name],
                "batch_stats": state.batch_stats[name],
            }
            x, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return x

    return project


def write(found: dict[str, Parts], out: str) -> None:
    """Draws the picture, writes the numbers beside it and prints the means."""
    panels = {
        title: {key: by_cosine(*values) for key, values in parts.items()}
        for title, parts in found.items()
    }
    drawn = plot_gradients(out, panels)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["state", "kind", "loss", *CosineBin._fields])
    for title, curves in panels.items():
        for (kind, loss), bins in curves.items():
            rows.writerows([title, kind, loss, *one] for one in bins)
        print(f"\n{title}\n{as_text(curves, found[title])}")
    beside = os.path.splitext(out)[0] + ".csv"
    storage.write(beside, table.getvalue().encode())
    print(f"\nwrote {f'{out} and ' if drawn else ''}{beside}")


def as_text(curves: dict[tuple[str, str], list[CosineBin]], parts: Parts) -> str:
    """The means by cosine, and how much hard pairs have of what easy ones have."""
    lines = ["cosine              pairs              L_out       L_in"]
    for kind in KINDS:
        columns = [curves[kind, loss] for loss in LOSSES]
        for bins in zip(*columns, strict=True):
            one = bins[0]
            means = "  ".join(f"{found.mean:9.3g}" for found in bins)
            lines.append(
                f"{one.low:4.1f} to {one.high:4.1f}  {one.pairs:11,} {kind}  {means}"
            )
    # Of a negative both losses have the same part.
    for kind, loss, named in (
        ("positive", "L_out", "L_out"),
        ("positive", "L_in", "L_in"),
        ("negative", "L_out", "both"),
    ):
        told = hard_and_easy(*parts[kind, loss], positive=kind == "positive")
        lines.append(
            f"{named}: the hardest tenth of {kind}s (cosine {told.hard_cosine:.2f}) has "
            f"{told.hard:.3g}, the easiest ({told.easy_cosine:.2f}) {told.easy:.3g}; "
            f"{told.share:.0%} of the sum is of the hardest"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
