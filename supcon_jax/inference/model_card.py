"""The two files by which people and hubs know an exported model: README.md, config.json."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

import supcon_jax
from supcon_jax import storage
from supcon_jax.config.check import flatten
from supcon_jax.config.keys import KEYS
from supcon_jax.inference.export import (
    Written,
    bare_encoder,
    classifier_name,
    holds_classifier,
    normalizes,
)
from supcon_jax.inference.model import Model
from supcon_jax.metrics import METRICS, label_and_value
from supcon_jax.run.workdir import finished_metrics, read_facts

# Of encoders that torchvision builds under the same name.
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def describe(model: Model) -> dict[str, Any]:
    """`config.json`: what a program must know to use the files.

    `architecture`, `num_classes`, `num_features` and `pretrained_cfg` are what timm reads.
    """
    config, data = model.config, model.config.data
    size = data.image_size
    encoder, variables = bare_encoder(model)
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features = jax.eval_shape(
        functools.partial(encoder.apply, train=False), variables, pixels
    ).shape[1]
    described: dict[str, Any] = {
        "library_name": "supcon_jax",
        "architecture": config.encoder.name,
        "encoder": {
            "name": config.encoder.name,
            "width": config.encoder.width,
            "stem": config.encoder.stem,
            "convention": config.encoder.convention,
        },
        "num_features": features,
        "preprocessing": {
            "input": "RGB uint8, [batch, height, width, 3]",
            "resize_short_side": data.eval_resize,
            "interpolation": "bilinear, without antialiasing",
            "central_crop": size,
            "scale": "(x / 255 - mean) / std",
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": "bilinear",
            "crop_pct": size / data.eval_resize,
            "crop_mode": "center",
            "classifier": classifier_name(model),
        },
        "run": json.loads(json.dumps(_public(model))),
    }
    if model.trained.head is not None:
        described |= {
            # timm looks for a classifier of so many among the weights.
            "num_classes": model.trained.num_classes if holds_classifier(model) else 0,
            "classifier_reads": reads(model),
            "class_names": list(model.class_names),
            "embedding_of_unit_length_before_classifier": normalizes(model),
            "temperature": model.reference.facts["temperature"],
        }
    return described


def reads(model: Model) -> str:
    """Which output the classifier was trained on."""
    return "embedding" if holds_classifier(model) else "projection"


def write_card(model: Model, name: str, files: list[Written]) -> str:
    """`README.md`: what the model is, what it reached, and how each file is loaded."""
    parts = [
        _front_matter(model),
        f"# {name}",
        _summary(model),
        "## Results",
        _results(model),
        "## Data",
        _data(model),
        "## Intended use",
        _intended_use(model),
        "## Files",
        *(_file(model, written) for written in files if not written.left_out),
        "## Images",
        _preprocessing(model),
        "## Config",
        _config(model),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Model) -> str:
    task = "image-classification" if model.trained.head else "image-feature-extraction"
    tags = ("jax", "supervised-contrastive-learning", task)
    lines = ["---", "library_name: supcon_jax", f"pipeline_tag: {task}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _summary(model: Model) -> str:
    config, size = model.config, model.config.data.image_size
    what = "Embeds images"
    if model.trained.head is not None:
        what = f"Tells images of {model.trained.num_classes} classes apart"
    how = f"mode `{config.mode}`, loss `{config.loss.name}`"
    if config.mode == "linear_eval":
        how = "a linear classifier on a frozen encoder"
    return (
        f"{what}: `{config.encoder.name}` (width {config.encoder.width:g}, stem "
        f"`{config.encoder.stem}`) on images of {size} x {size} pixels, {how}. Trained "
        f"with supcon_jax {supcon_jax.__version__} (JAX {jax.__version__}), step "
        f"{model.trained.step:,}{', the average of its steps' if model.average else ''}."
    )


def _results(model: Model) -> str:
    metrics = finished_metrics(model.workdir) or {}
    if model.average:
        metrics = {}  # of the encoder itself
    rows = [
        (f"`{name}`", label_and_value(name, metrics[name])[1])
        for name, metric in METRICS.items()
        if name in metrics and metric.is_result
    ]
    if model.trained.head is not None and model.reference.facts["images"]:
        facts = model.reference.facts
        rows += [
            ("calibration error of the probabilities", f"{facts['scaled_ece']:.2%}"),
            ("the same without the temperature", f"{facts['ece']:.2%}"),
        ]
    table = _table(("metric", "value"), rows)
    if model.trained.head is None:
        return table
    facts = model.reference.facts
    return (
        f"{table}\n\nThe temperature of the probabilities, {facts['temperature']:.4g}, "
        f"is that of {facts['images']:,} images of `{facts['split']}`; the calibration "
        "error is of each half of them with the temperature of the other."
    )


def _data(model: Model) -> str:
    data, facts = model.config.data, read_facts(model.workdir).get("data", {})
    rows = [
        (split, f"{found['examples']:,} images, {found['classes']} classes")
        for split, found in facts.items()
    ]
    text = f"`{data.name}`\n\n{_table(('split', 'images'), rows)}"
    if model.trained.head is not None:
        names = ", ".join(f"`{name}`" for name in model.class_names)
        text += f"\n\nClasses, in the order of the outputs: {names}."
    return text


def _intended_use(model: Model) -> str:
    if model.trained.head is None:
        return (
            "Embeddings for search, clustering and classifiers of images like those of "
            "the training. What they are worth on other images was not measured."
        )
    return (
        "Images of the classes above, taken as those of the training were. An image of "
        "none of them is given one of them all the same: its probabilities say nothing, "
        "and its distance to the training images does (`supcon_jax.tools.predict`). "
        "What it reaches on other images was not measured."
    )


def _file(model: Model, written: Written) -> str:
    told = ", ".join(f"{n} {d:.1e}" for n, d in written.differences.items())
    how = {
        "model.safetensors": _in_pytorch,
        "model.stablehlo": _in_jax,
        "model.onnx": _in_onnx,
    }[written.name](model)
    return (
        f"### {written.name}\n\n{how}\n\nLargest difference to the run's own outputs, "
        f"over their largest value: {told}."
    )


def _in_jax(model: Model) -> str:
    return f"""The whole model, with what prepares the images; it needs JAX alone.

```python
import jax.export

with open("model.stablehlo", "rb") as file:
    model = jax.export.deserialize(bytearray(file.read()))
outputs = model.call(images)  # uint8 [n, height, width, 3] of any n and size
{_outputs(model)}
```"""


def _in_onnx(model: Model) -> str:
    size = model.config.data.image_size
    return f"""The model for images that are resized and cropped already.

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
names = [output.name for output in session.get_outputs()]
outputs = dict(zip(names, session.run(names, {{"images": images}})))
# images: uint8 [n, {size}, {size}, 3]
{_outputs(model)}
```"""


def _outputs(model: Model) -> str:
    if model.trained.head is None:
        return 'outputs["embedding"]'
    return 'outputs["embedding"], outputs["logits"], outputs["probabilities"]'


def _in_pytorch(model: Model) -> str:
    """The names are PyTorch's; what a network of that name computes may differ."""
    config, name = model.config, model.config.encoder.name
    convention = config.encoder.convention
    layer = classifier_name(model)
    text = "The weights under the names of torchvision and timm."
    changed = []
    if name.startswith("resnet"):
        if config.encoder.width != 1:
            changed.append(f"its channels are {config.encoder.width:g} times as many")
        if config.encoder.stem == "cifar":
            changed.append("`conv1` is 3 x 3 with stride 1, and no max-pool follows")
        elif convention == "official":
            changed.append("the max-pool pads one row below and right alone")
        if convention == "official" and name in ("resnet18", "resnet34"):
            changed.append("`layer1.0` has a `downsample` too")
        if name not in TORCHVISION:
            changed.append("torchvision has no network of this depth")
    if changed:
        text += f" A network that takes them differs from theirs: {'; '.join(changed)}."
    elif name in TORCHVISION:
        classes = model.trained.num_classes
        text += f"""

```python
import torchvision
from safetensors.torch import load_file

model = torchvision.models.{name}(num_classes={classes}).eval()
model.load_state_dict(load_file("model.safetensors"), strict={holds_classifier(model)})
```"""
    if model.trained.head is not None and not holds_classifier(model):
        text += (
            f" The encoder alone: the classifier reads projections, and neither `{layer}` "
            "nor the projection head is in this file; `model.stablehlo` has all of them."
        )
    elif normalizes(model):
        text += (
            f" The classifier, `{layer}`, takes embeddings of unit length: `logits = "
            f"{layer}(torch.nn.functional.normalize(embedding))`."
        )
    return text


def _preprocessing(model: Model) -> str:
    data = model.config.data
    return (
        f"RGB, upright as the EXIF tag says; the short side resized to {data.eval_resize} "
        f"pixels (bilinear, without antialiasing), the central {data.image_size} x "
        f"{data.image_size} cut out, `(x / 255 - mean) / std` with mean "
        f"{list(data.mean)} and std {list(data.std)}. `config.json` has the same."
    )


def _config(model: Model) -> str:
    """The keys that are not at their default."""
    rows = [
        (f"`{key}`", f"`{value}`")
        for key, value in _public(model).items()
        if value != KEYS[key].default
    ]
    return _table(("key", "value"), rows)


def _public(model: Model) -> dict[str, Any]:
    """The keys that change results, without the places of files on this machine."""
    flat = flatten(model.config.to_dict())
    for key in ("pretrained", "encoder.init_from"):
        flat[key] = storage.name(flat[key])
    return {key: value for key, value in flat.items() if not KEYS[key].free}


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)
    )
