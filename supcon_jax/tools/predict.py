"""Classes of photos by a finished run, and what each answer rests on.

    python -m supcon_jax.tools.predict runs/linear_digits photo.jpg other.png
    python -m supcon_jax.tools.predict runs/linear_folder photos --json

Prints classes with calibrated probabilities, below them the nearest training images with their
cosine, and whether a photo is unlike the training data. A folder stands for all images in it. The first time, the run's
own data are read; where they have moved, `--config.data.root=DIR` or `--config.data.dir=DIR`
says where they are. docs/use.md says what every number is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from supcon_jax import storage
from supcon_jax.cli import one_line_errors
from supcon_jax.data.folders import list_images
from supcon_jax.inference.model import Model, Prediction, load_model
from supcon_jax.inference.reference import QUANTILE
from supcon_jax.logs import setup_logging
from supcon_jax.tools.arguments import create_parser, model_changes, parse

# Classes that are told: so many at most, beside the first those above this probability.
CLASSES, LEAST = 5, 0.001


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, predicts and prints."""
    parser = create_parser(__doc__.splitlines()[0], takes_config=False)
    parser.add_argument("workdir", help="of a finished run with a classifier")
    parser.add_argument("images", nargs="+", help="files, or folders of images")
    parser.add_argument(
        "--neighbours", type=int, default=3, help="nearest training images to name"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options, changes = parse(parser, arguments)
    with one_line_errors():
        if options.neighbours < 0:
            raise ValueError(
                f"got --neighbours={options.neighbours}; allowed: 0 or more"
            )
        if not options.json:
            setup_logging()  # otherwise standard output holds the document alone
        files = [file for name in options.images for file in _files(name)]
        model = load_model(options.workdir, **model_changes(changes))
        _ = model.reference  # refuses before photos are read
        failed: dict[str, str] = {}
        found = predict(model, files, options.neighbours, failed)
        if options.json:
            print(json.dumps(as_document(model, dict(found), failed), indent=2))
        else:
            for name, prediction in found:
                print(as_text(model, name, prediction))
            print(calibration_note(model))
        if failed:
            told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise ValueError(
                f"{len(failed)} of {len(files)} images cannot be read: {told}"
            )


def _files(name: str) -> list[str]:
    return list_images(name) if storage.is_dir(name) else [name]


def predict(
    model: Model, files: list[str], neighbours: int, failed: dict[str, str]
) -> Iterator[tuple[str, Prediction]]:
    """Predictions by file; notes those that cannot be read, and why, in `failed`."""
    remaining = iter(files)
    for pixels, some in model.prepare(files):
        failed |= some
        if len(pixels):
            embeddings = model.encode(pixels)
            for prediction in model.judge(embeddings, neighbours=neighbours):
                yield next(f for f in remaining if f not in failed), prediction


def as_text(model: Model, name: str, prediction: Prediction) -> str:
    """A prediction for people."""
    first, *others = _largest(model, prediction)
    told = [first, *((c, p) for c, p in others if p >= LEAST)]
    lines = [f"{name}: {', '.join(f'{c} {p:.1%}' for c, p in told)}"]
    for n in prediction.neighbours:
        lines.append(f"  {n.similarity:.3f}  {n.class_name or 'no label'}  {n.name}")
    if prediction.unlike:
        lines.append(
            f"  unlike the training images: distance {prediction.distance:.3f}; "
            f"{QUANTILE:.0%} of the evaluation images have at most "
            f"{model.reference.facts['threshold']:.3f}"
        )
    return "\n".join(lines)


def _largest(model: Model, prediction: Prediction) -> list[tuple[str, float]]:
    """The classes with the largest probabilities."""
    order = np.argsort(-prediction.probabilities, kind="stable")[:CLASSES]
    return [
        (model.class_names[label], float(prediction.probabilities[label]))
        for label in order
    ]


def as_document(
    model: Model, found: dict[str, Prediction], failed: dict[str, str]
) -> dict[str, Any]:
    """All predictions for programs."""
    facts = model.reference.facts
    images = [
        {
            "file": name,
            "class": prediction.class_name,
            "classes": [
                {"class": c, "probability": p} for c, p in _largest(model, prediction)
            ],
            "nearest": [
                {"image": n.name, "class": n.class_name, "cosine": n.similarity}
                for n in prediction.neighbours
            ],
            "distance": prediction.distance,
            "unlike_training": prediction.unlike,
        }
        for name, prediction in found.items()
    ]
    keys = ("split", "images", "temperature", "ece", "scaled_ece")
    return {
        "workdir": model.workdir,
        "step": model.trained.step,
        "calibration": {key: facts[key] for key in keys if key in facts},
        "threshold": facts["threshold"],
        "images": images,
        "unreadable": failed,
    }


def calibration_note(model: Model) -> str:
    """What the probabilities were calibrated on."""
    facts = model.reference.facts
    if not facts["images"]:
        return f"probabilities are not calibrated: no image of {facts['split']!r} has a label"
    return (
        f"probabilities are calibrated on the {facts['images']:,} images of "
        f"{facts['split']!r}: temperature {facts['temperature']:.3f}, calibration error "
        f"{facts['scaled_ece']:.1%}, without it {facts['ece']:.1%}"
    )


if __name__ == "__main__":
    main()
