"""Draws what the encoder sees: a grid of training images and their augmented views.

    python -m supcon_jax.tools.show_batch --config=configs/digits.py --out=batch.png
    python -m supcon_jax.tools.show_batch --config=configs/supcon_r50.py \\
        --config.data.dir=DIR --config.augment.policy=auto_augment --out=batch.png

Each row is one image: as the evaluation crops it, then its views as a training step
sees them (before mean and standard deviation), with the name of its class.
"""

from __future__ import annotations

import io
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from supcon_jax import builders, parallel, storage
from supcon_jax.cli import one_line_errors
from supcon_jax.config.loading import load_config
from supcon_jax.data.pipeline import eval_batches, on_host
from supcon_jax.run.batches import build_sampler, build_train_batches
from supcon_jax.run.defaults import resolve
from supcon_jax.run.splits import open_sources
from supcon_jax.tools.arguments import check_out, create_parser, parse


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and draws the picture."""
    parser = create_parser(__doc__.splitlines()[0])
    parser.add_argument("--out", default="batch.png", help="the picture to write")
    parser.add_argument("--rows", type=int, default=8, help="images to show")
    options, changes = parse(parser, arguments)
    with one_line_errors():
        out = options.out
        check_out(out)
        config = resolve(load_config(options.config, changes))
        draw(config, out, rows=options.rows)
        print(f"wrote {out}")


def draw(config: ConfigDict, out: str, *, rows: int) -> None:
    """Writes the picture of the first images of the first training step."""
    from matplotlib.figure import Figure

    whole, views, labels = first_views(config, rows)
    names = open_sources(config)[0].class_names
    rows, columns = len(views), 1 + views.shape[1]
    figure = Figure(figsize=(1.6 * columns + 0.4, 1.7 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        label = int(labels[row])
        name = names[label] if label < len(names) else str(label)
        if label < 0:
            name = "no label"
        for column, image in enumerate([whole[row], *views[row]]):
            axis = axes[row, column]
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"view {column}" if column else "image", fontsize=9)
        axes[row, 0].set_ylabel(name[:20], fontsize=8)
    figure.tight_layout(pad=0.4)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=pathlib.PurePath(out).suffix[1:] or "png")
    storage.write(out, picture.getvalue())


def first_views(
    config: ConfigDict, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole images `[n, S, S, 3]`, views `[n, V, S, S, 3]` in [0, 1], labels `[n]`."""
    config = ConfigDict(config)
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    train, _ = open_sources(config)
    sampler = build_sampler(config, train)
    batch = next(build_train_batches(config, train, sampler))
    head = {key: value[:rows] for key, value in batch.items()}
    augment = jax.jit(
        builders.build_augmentation(
            config,
            parallel.create_mesh(jax.devices()[:1]),
            whole_images=not on_host(train),
        )
    )
    views = np.asarray(augment(head["image"], head["id"]))
    if train.synthetic:
        return views[:, 0], views, head["label"]
    shown = train.take_rows(head["id"][:, 1])
    (whole,) = eval_batches(
        shown,
        batch_size=len(views),
        image_size=config.data.image_size,
        resize=config.data.eval_resize,
    )
    # Where an image may show several classes, a training batch has their weights.
    labels = head["label"] if train.label_sets is None else whole["label"]
    return whole["image"][:, 0], np.clip(views, 0, 1), labels


if __name__ == "__main__":
    main()
