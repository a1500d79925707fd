"""Measures the embeddings of a pretraining run and its projections, side by side.

    python -m supcon_jax.tools.embeddings runs/digits
    python -m supcon_jax.tools.embeddings runs/digits --classifier=runs/linear_digits \\
        --ood=synthetic

kNN over a grid of k and temperature; retrieval within the test split and from the training
split; how the embeddings lie; and with --ood how well they tell images of another source
from those of the run. Prints a table and writes `embeddings.json` into the run's folder.
Features are extracted once and kept there too. docs/evaluation.md defines every number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders, parallel, storage
from supcon_jax.checkpoint import digest, restore_state
from supcon_jax.cli import one_line_errors
from supcon_jax.config.check import config_of
from supcon_jax.config.keys import ENCODER_KEYS
from supcon_jax.config.loading import apply_changes, load_config
from supcon_jax.data.datasets import open_source
from supcon_jax.data.selection import take_classes
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.embeddings import detection_metrics, embedding_metrics
from supcon_jax.inference.reference import logits_of
from supcon_jax.logs import setup_logging
from supcon_jax.metrics import METRICS, label_and_value
from supcon_jax.objectives import has_projection
from supcon_jax.pretrained import features
from supcon_jax.pretrained.features import Features
from supcon_jax.pretrained.model import (
    TrainedModel,
    check_keys,
    check_projection,
    load_model,
    warn_if_unfinished,
)
from supcon_jax.run.opening import setup_compilation_cache
from supcon_jax.run.report import next_command
from supcon_jax.run.splits import open_sources
from supcon_jax.run.workdir import read_config
from supcon_jax.storage import epaths
from supcon_jax.tools.arguments import create_parser, parse

logger = logging.getLogger(__name__)
PyTree = Any
REPRESENTATIONS = ("embedding", "projection")
OTHER_CLASSES = "other_classes"  # of --ood: those that data.classes leaves out
FILE = "embeddings.json"


class Model(NamedTuple):
    """A pretraining run, restored.

    Attributes:
      config: of the run, with changes.
      workdir: its folder.
      mesh: the devices.
      step: of its checkpoint.
      encoder, head: images to embeddings, and those to projections (None: a classifier).
      variables, head_variables: `{"params": ..., "batch_stats": ...}` of both.
    """

    config: ConfigDict
    workdir: str
    mesh: Mesh
    step: int
    encoder: nn.Module
    head: nn.Module | None
    variables: PyTree
    head_variables: PyTree


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures, prints and writes."""
    parser = create_parser(__doc__.splitlines()[0], takes_config=False)
    parser.add_argument("workdir", help="of a pretraining run")
    parser.add_argument(
        "--representation", default="both", help="embedding, projection or both"
    )
    parser.add_argument(
        "--ood",
        default="",
        help="images that are not of the run's classes: a data.name, a config, or "
        f"{OTHER_CLASSES}, those that data.classes leaves out",
    )
    parser.add_argument(
        "--ood_split", default="", help="of them: test, or the config's eval_split"
    )
    parser.add_argument(
        "--ood_k",
        type=int,
        default=0,
        help="neighbour whose distance counts; 0: 50, or half of the smallest class",
    )
    parser.add_argument(
        "--classifier",
        default="",
        help="workdir of a linear evaluation of the run, for the largest softmax",
    )
    options, changes = parse(parser, arguments)
    setup_logging()
    with one_line_errors():
        if options.representation not in (*REPRESENTATIONS, "both"):
            raise ValueError(
                f"got --representation={options.representation}; allowed: embedding, "
                "projection, both"
            )
        if options.ood_k < 0:
            raise ValueError(f"got --ood_k={options.ood_k}; allowed: 1 or more, or 0")
        model = open_model(options.workdir, changes)
        wanted = chosen(options.representation, model)
        other = classifier = None
        if options.ood:
            other = open_other(model, options.ood, options.ood_split)
            classifier = open_classifier(model, options.classifier)
        elif options.classifier:
            raise ValueError(
                "--classifier is for the largest softmax of images that are not of the "
                "run's classes; give those too: --ood=NAME"
            )
        found = measure(
            model, wanted, classifier=classifier, other=other, ood_k=options.ood_k
        )
        found["ood"] = options.ood
        if changes:
            found["changes"] = changes
        print(as_text(found, wanted, model))
        print(f"\nWritten: {write(found, model)}")
        if model.config.next_config:
            path = epaths.as_path(model.workdir)
            print(f"Next:    {next_command(model.config, path)}")


def write(found: dict[str, Any], model: Model) -> str:
    """Writes `embeddings.json` into the run's folder; returns where."""
    path = storage.join(model.workdir, FILE)
    storage.write(path, (json.dumps(found, indent=2) + "\n").encode())
    return storage.shown(path)


def open_model(workdir: str, changes: list[str]) -> Model:
    """A pretraining run with its newest whole checkpoint.

    Raises:
      ValueError: there is no such run, it has saved nothing, or a change makes another
        encoder of it.
    """
    theirs = read_config(workdir)
    mode = theirs.get("mode") if theirs else None
    if mode != "pretrain":
        what = f"mode={mode}" if mode else "no run"
        of = (theirs or {}).get("pretrained")
        instead = f": python -m supcon_jax.tools.embeddings {of}" if of else ""
        raise ValueError(
            f"{workdir} holds {what}; give the workdir of a pretraining run{instead}"
        )
    assert theirs is not None
    config = config_of(theirs)
    mesh = parallel.create_mesh()
    # Batches of the frozen encoder alone; what comes out does not depend on them.
    config.batch_size = max(min(config.batch_size, 256) // mesh.size, 1) * mesh.size
    config.microbatch_size = config.data.lanes = 0
    config.pretrained = workdir
    apply_changes(config, changes)
    if config.data.fake:
        raise ValueError(
            f"{workdir} was trained on noise, of which there is nothing to measure "
            "(--config.data.fake=False)"
        )
    check_keys(config, theirs, (*ENCODER_KEYS, "mode", "loss.name"))
    parallel.check_batch_size(config.batch_size, mesh)
    warn_if_unfinished(workdir)
    setup_compilation_cache(enabled=config.compilation_cache)
    state = restore_state(workdir, sharding=parallel.replicated(mesh))
    head = None
    if has_projection(config):
        head = builders.build_projection(config, 0)
    return Model(
        config=config,
        workdir=workdir,
        mesh=mesh,
        step=int(state.step),
        encoder=builders.build_encoder(config, parallel.platform(mesh)),
        head=head,
        variables=state.encoder_variables(),
        head_variables={
            "params": state.params["head"],
            "batch_stats": state.batch_stats.get("head", {}),
        },
    )


def chosen(representation: str, model: Model) -> list[str]:
    """Which outputs are measured.

    Raises:
      ValueError: there is no such output.
    """
    if representation == "projection":
        check_projection(model.workdir, model.config)
    if representation != "both":
        return [representation]
    return list(REPRESENTATIONS if model.head is not None else REPRESENTATIONS[:1])


def open_classifier(model: Model, workdir: str) -> TrainedModel | None:
    """A classifier on the run's encoder: of a linear evaluation, or the run's own.

    Raises:
      ValueError: the run in `workdir` has none, or one of another encoder.
    """
    if not workdir:
        try:
            return load_model(model.workdir, model.mesh)
        except ValueError as error:
            logger.info("no largest softmax: %s", error)
            return None
    found = load_model(workdir, model.mesh)
    encoder = found.variables["encoder"]
    if reads(found) == "projection":
        encoder = {kind: tree.get("encoder", {}) for kind, tree in encoder.items()}
    if digest(encoder) != digest(model.variables):
        raise ValueError(
            f"the classifier in {workdir} was trained on another encoder than that of "
            f"step {model.step} in {model.workdir} (--classifier)"
        )
    return found


def reads(classifier: TrainedModel) -> str:
    """Which output a classifier was trained on; a pretraining run's own: the embedding."""
    config = classifier.config
    return config.representation if config.mode == "linear_eval" else "embedding"


def open_other(model: Model, name: str, split: str) -> Source:
    """The images that are not of the run's classes, in the size of the run's.

    Raises:
      ValueError: there are none of that name.
    """
    data = ConfigDict(model.config.data)
    left_out = name == OTHER_CLASSES
    if left_out and not data.classes:
        raise ValueError(
            f"got --ood={name}, and the run has all classes; allowed: runs with data.classes"
        )
    if left_out:
        name = data.name
    else:
        data.eval_split, data.classes = "test", ()
    if ".py" in name:
        data = load_config(name, []).data
        if model.config.data.dir:
            data.dir = model.config.data.dir
        name = data.name
    source = open_source(
        name,
        split or data.eval_split,
        dir=data.dir,
        root=data.root,
        image_key=data.image_key,
        label_key=data.label_key,
        skip_errors=data.skip_errors,
    )
    source = take_classes(source, data.classes, others=left_out)
    return _resized(source, model.config.data.image_size)


def _resized(source: Source, size: int) -> Source:
    """Images in memory as squares of another size; others are resized when they are read."""
    if source.images is None or source.images.shape[1:3] == (size, size):
        return source
    height, width = source.images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = source.images[:, top : top + side, left : left + side]
    shape = (len(square), size, size, 3)
    images = jax.image.resize(jnp.float32(square), shape, "linear")
    pixels = np.asarray(jnp.clip(jnp.round(images), 0, 255)).astype(np.uint8)
    return dataclasses.replace(source, images=pixels)  # type: ignore[type-var]


def measure(
    model: Model,
    representations: list[str],
    *,
    classifier: TrainedModel | None,
    other: Source | None,
    ood_k: int = 0,
) -> dict[str, Any]:
    """Every number of every representation.

    Args:
      model: a run.
      representations: names of its outputs.
      classifier: on one of them, for the largest softmax.
      other: images that are not of the run's classes.
      ood_k: see `detection_metrics`.

    Returns:
      `{"step": ..., "data": ..., representation: {metric: value}}`.
    """
    train, evaluation = open_sources(model.config)
    place = functools.partial(parallel.split_rows, mesh=model.mesh)
    splits = {"train": train, "evaluation": evaluation}
    if other is not None:
        splits["other"] = other
    found = {name: _extract(model, name, source) for name, source in splits.items()}
    if not all(np.any(found[name].labels >= 0) for name in ("train", "evaluation")):
        logger.info("no kNN, retrieval and geometry: they need labels in both splits")
    result: dict[str, Any] = {
        "step": model.step,
        "data": model.config.data.name,
        "num_train": len(found["train"].labels),
        "num_evaluation": len(found["evaluation"].labels),
    }
    for representation in representations:
        values = found
        if representation == "projection":
            assert model.head is not None
            project = functools.partial(
                features.project, model.head, model.head_variables
            )
            values = {name: project(x) for name, x in found.items()}
        knn = model.config.knn
        metrics = embedding_metrics(
            *values["train"],
            *values["evaluation"],
            k=knn.k,
            temperature=knn.temperature,
            num_classes=train.num_classes,
            place=place,
        )
        if other is not None:
            logits = None
            if classifier and reads(classifier) == representation:
                logits = functools.partial(logits_of, classifier)
            metrics |= detection_metrics(
                *values["train"],
                values["evaluation"].values,
                values["other"].values,
                k=ood_k,
                logits=logits,
                place=place,
            )
        result[representation] = metrics
    return result


def _extract(model: Model, name: str, source: Source) -> Features:
    return features.extract(
        model.config,
        model.mesh,
        model.encoder,
        model.variables,
        source,
        name=name,
        folders=[storage.join(model.workdir, "features")],
    )


def as_text(found: dict[str, Any], representations: list[str], model: Model) -> str:
    """The numbers for people, one column a representation."""
    lines = [
        f"{storage.shown(model.workdir)}, step {found['step']:,}: "
        f"{found['num_train']:,} training and {found['num_evaluation']:,} test images of "
        f"{found['data']}",
        "",
        _row("", representations),
    ]
    for name in METRICS:
        cells = [
            label_and_value(name, found[r][name]) if name in found[r] else ("", "")
            for r in representations
        ]
        if label := next((label for label, _ in cells if label), ""):
            lines.append(_row(label, [value for _, value in cells]))
    for representation in representations:
        lines += _grid(representation, found[representation])
    return "\n".join(lines)


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<34}" + "".join(f"{cell:>12}" for cell in cells)


def _grid(representation: str, metrics: dict[str, float]) -> list[str]:
    """kNN by k and temperature."""
    cells = {}
    for name, value in metrics.items():
        if name.startswith("knn/top1_k"):
            number, _, temperature = name.removeprefix("knn/top1_k").partition("_t")
            cells[int(number), float(temperature)] = value
    if not cells:
        return []
    temperatures = sorted({temperature for _, temperature in cells})
    lines = [
        "",
        _row(
            f"kNN top-1 of the {representation}",
            ["T = " + f"{t:g}" for t in temperatures],
        ),
    ]
    for k in sorted({k for k, _ in cells}):
        lines.append(_row(f"  k = {k}", [f"{cells[k, t]:.2%}" for t in temperatures]))
    return lines


if __name__ == "__main__":
    main()
