"""A finished run as files for other programs, each held to the run's own outputs.

`model.safetensors` has the encoder under PyTorch's names, `model.stablehlo` is the whole model
as JAX runs it anywhere, `model.onnx` the same for ONNX runtimes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from supcon_jax import builders
from supcon_jax.data.images import central_crop
from supcon_jax.inference.model import Model
from supcon_jax.models import EncoderWithProjection
from supcon_jax.weights import (
    from_state_dict,
    read_weights,
    to_state_dict,
    write_safetensors,
)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Of the largest value of an output; float32 keeps about seven digits, and a deep network
# loses two or three of them when its sums are taken in another order.
TOLERANCE = 1e-4
# Understood by runtimes of the last years.
OPSET = 18

Outputs = dict[str, Any]


class Written(NamedTuple):
    """A file that was written, or why it was not.

    Attributes:
      name: of the file.
      differences: name of an output -> largest difference to the run's, over the largest
        value of that output.
      left_out: why there is no such file; "" where there is one.
    """

    name: str
    differences: dict[str, float]
    left_out: str = ""


def in_float32(model: Model) -> Model:
    """The same model with an encoder that computes in float32, as files hold it.

    An accelerator's bfloat16 is what training needs; other programs have float32.
    """
    config = model.config
    encoder = builders.build_representation(config, "cpu")
    variables = jax.device_get(model.trained.variables)  # of no device
    trained = dataclasses.replace(model.trained, encoder=encoder, variables=variables)
    return Model(model.workdir, config, trained, model.mesh, average=model.average)


def forward(
    model: Model, *, temperature: float, crop: bool
) -> Callable[[jax.Array], Outputs]:
    """`uint8 [B, H, W, 3] -> {"embedding", "logits", "probabilities"}`, all of a model.

    A run without a classifier gives the embedding alone.

    Args:
      model: see `in_float32`.
      temperature: that divides the logits before the softmax.
      crop: whether images of any size are resized and cropped first.
    """
    data, trained = model.config.data, model.trained
    normalize = builders.build_normalization(model.config)

    def apply(images: jax.Array) -> Outputs:
        if crop:
            images = central_crop(
                images, image_size=data.image_size, resize=data.eval_resize, xp=jnp
            )
        pixels = normalize(images.astype(jnp.float32) / 255.0)
        embedding: Any = trained.encoder.apply(
            trained.variables["encoder"], pixels, train=False
        )
        if trained.head is None:
            return {"embedding": embedding}
        logits: Any = trained.head.apply(
            trained.variables["head"], embedding, train=False
        )
        probabilities = jax.nn.softmax(logits / temperature)
        return {
            "embedding": embedding,
            "logits": logits,
            "probabilities": probabilities,
        }

    return apply


def expected_outputs(model: Model, images: np.ndarray, temperature: float) -> Outputs:
    """What the run itself gives for images `[n, H, W, 3]`, by another way than `forward`."""
    outputs = {"embedding": model.embed(images)}
    if model.trained.head is not None:
        logits = model.logits(outputs["embedding"])
        outputs["logits"] = logits
        shifted = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        outputs["probabilities"] = shifted / shifted.sum(1, keepdims=True)
    return outputs


def compare(name: str, found: Outputs, expected: Outputs) -> Written:
    """Holds the outputs of an exported file to the run's own.

    Raises:
      ValueError: one differs by more than `TOLERANCE`.
    """
    differences = {}
    for output, values in expected.items():
        if output not in found:
            continue
        largest = np.max(np.abs(values))
        difference = np.max(np.abs(np.asarray(found[output], np.float64) - values))
        differences[output] = float(difference / max(largest, 1e-30))
        if not differences[output] <= TOLERANCE:
            raise ValueError(
                f"{name} does not give what the run gives: its {output} differs by "
                f"{difference:.2g}, values are up to {largest:.2g}"
            )
    return Written(name, differences)


def sample_images(height: int, width: int, count: int = 3) -> np.ndarray:
    """Images `[count, height, width, 3]` on which files are compared: blots of all sizes."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, height, width, 3))
    for size in (1, 2, 4, 8, 16):
        blots = rng.normal(size=(count, height // size + 1, width // size + 1, 3))
        blots = blots.repeat(size, axis=1).repeat(size, axis=2)
        images += blots[:, :height, :width]
    return np.clip(127.5 + 40 * images, 0, 255).astype(np.uint8)


def write_stablehlo(folder: pathlib.Path, model: Model, temperature: float) -> Written:
    """The model for JAX on any device, without this package; images of any size."""
    path = folder / "model.stablehlo"
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 3"), jnp.uint8)
    function = jax.jit(forward(model, temperature=temperature, crop=True))
    exported = jax.export.export(function, platforms=PLATFORMS)(batch)
    path.write_bytes(exported.serialize())
    call = jax.export.deserialize(bytearray(path.read_bytes())).call
    size, resize = model.config.data.image_size, model.config.data.eval_resize
    found = []
    for shape in ((size, size), (resize + 9, 2 * resize)):
        images = sample_images(*shape)
        # What is of the run's size already, `embed` would not resize.
        cropped = central_crop(images, image_size=size, resize=resize)
        expected = expected_outputs(model, cropped, temperature)
        found.append(compare(path.name, call(images), expected))
    return max(found, key=lambda written: max(written.differences.values()))


def write_weights(folder: pathlib.Path, model: Model) -> Written:
    """The encoder, and the classifier on it, under their names in PyTorch.

    The projection head has no names there, and without it a classifier of projections has
    nothing to read: the encoder is written alone.
    """
    path = folder / "model.safetensors"
    name, trained = model.config.encoder.name, model.trained
    encoder, variables = bare_encoder(model)
    classifier = None
    if holds_classifier(model):
        classifier = trained.variables["head"]["params"]["dense_out"]
    try:
        arrays = to_state_dict(
            name,
            variables["params"],
            variables.get("batch_stats", {}),
            classifier=classifier,
        )
    except ValueError as error:
        return Written(path.name, {}, left_out=str(error))
    convention = model.config.encoder.convention
    write_safetensors(path, arrays, metadata={"format": "pt", "convention": convention})

    read = read_weights(path).arrays
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    params, batch_stats = from_state_dict(name, read, shapes)
    size = model.config.data.image_size
    images = sample_images(size, size)
    scale = builders.build_normalization(model.config)
    pixels = scale(jnp.asarray(images, jnp.float32) / 255.0)
    given = {"params": params, "batch_stats": batch_stats}
    found = {"embedding": encoder.apply(given, pixels, train=False)}
    expected = {"embedding": encoder.apply(variables, pixels, train=False)}
    if classifier is not None:
        weight, bias = (
            read[f"{classifier_name(model)}.{x}"] for x in ("weight", "bias")
        )
        features = np.asarray(found["embedding"], np.float64)
        if normalizes(model):
            features /= np.linalg.norm(features, axis=1, keepdims=True)
        found["logits"] = features @ weight.T + bias
        expected = expected_outputs(model, images, 1.0)
    return compare(path.name, found, expected)


def bare_encoder(model: Model) -> tuple[nn.Module, Any]:
    """The encoder without a projection head, and its variables."""
    encoder, variables = model.trained.encoder, model.trained.variables["encoder"]
    if not isinstance(encoder, EncoderWithProjection):
        return encoder, variables
    # One without BatchNorm has no statistics.
    inner = {kind: tree.get("encoder", {}) for kind, tree in variables.items()}
    return encoder.encoder, inner


def holds_classifier(model: Model) -> bool:
    """Whether `model.safetensors` has the classifier: one that reads the embedding."""
    of_projections = isinstance(model.trained.encoder, EncoderWithProjection)
    return model.trained.head is not None and not of_projections


def classifier_name(model: Model) -> str:
    """What the classifier is called among the weights."""
    return "head" if model.config.encoder.name.startswith("vit") else "fc"


def normalizes(model: Model) -> bool:
    """Whether the classifier scales the embedding to unit length first."""
    return bool(getattr(model.trained.head, "normalize_embedding", False))


def write_onnx(folder: pathlib.Path, model: Model, temperature: float) -> Written:
    """The model for ONNX runtimes, for images of the run's size; left out if not the same.

    What a converter of another project cannot do is no reason to have none of the others.
    """
    path = folder / "model.onnx"
    missing = [
        package
        for package in ("jax2onnx", "onnx", "onnxruntime")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        return Written(
            path.name, {}, left_out=f"{', '.join(missing)} not installed (docs/use.md)"
        )
    try:
        _convert(path, model, temperature)
        return _compare_onnx(path, model, temperature)
    except Exception as error:  # a converter raises all kinds
        path.unlink(missing_ok=True)
        why = next(iter(str(error).splitlines()), type(error).__name__)
        return Written(path.name, {}, left_out=f"jax2onnx: {why}")


def _convert(path: pathlib.Path, model: Model, temperature: float) -> None:
    """Writes an ONNX file with the names of the outputs of `forward`."""
    import jax2onnx
    import onnx

    size = model.config.data.image_size
    function = forward(model, temperature=temperature, crop=False)
    names = list(jax.eval_shape(function, jnp.zeros((1, size, size, 3), jnp.uint8)))
    converted = jax2onnx.to_onnx(
        lambda images: tuple(function(images)[name] for name in names),
        [jax.ShapeDtypeStruct(("B", size, size, 3), jnp.uint8)],
        model_name=model.config.encoder.name,
        opset=OPSET,
        input_names=["images"],
        output_names=names,
    )
    # Shapes of what lies between are wrong behind a transposition (jax2onnx 0.17.1), and
    # a runtime finds them itself.
    del converted.graph.value_info[:]
    onnx.checker.check_model(converted)
    path.write_bytes(converted.SerializeToString())


def _compare_onnx(path: pathlib.Path, model: Model, temperature: float) -> Written:
    import onnxruntime

    size = model.config.data.image_size
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    images = sample_images(size, size)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"images": images}), strict=True))
    return compare(path.name, found, expected_outputs(model, images, temperature))


def export_files(folder: pathlib.Path, model: Model) -> list[Written]:
    """Writes every file that can be made of a model into a folder, and checks each.

    Raises:
      ValueError: one does not give what the run gives.
    """
    temperature = 1.0
    if model.trained.head is not None:
        temperature = model.reference.facts["temperature"]
    model = in_float32(model)
    return [
        write_weights(folder, model),
        write_stablehlo(folder, model, temperature),
        write_onnx(folder, model, temperature),
    ]
