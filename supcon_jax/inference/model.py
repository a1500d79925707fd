"""A finished run in use: images in, embeddings and predictions out.

    from supcon_jax import load_model

    model = load_model("runs/linear_digits")
    embeddings = model.embed(["a.jpg", "b.jpg"])  # [2, D]
    first, second = model.predict(["a.jpg", "b.jpg"])

Images are prepared as the run's evaluation prepares them, without TensorFlow.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders, parallel, storage
from supcon_jax.config.check import config_of
from supcon_jax.data.images import central_crop, decode
from supcon_jax.data.sources import UNLABELLED, ArraySource
from supcon_jax.evaluation.calibration import log_probabilities
from supcon_jax.evaluation.knn import neighbours
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.inference.reference import Reference, logits_of, open_reference
from supcon_jax.pretrained.model import TrainedModel, find_used_run, no_classifier
from supcon_jax.pretrained.model import load_model as load_trained
from supcon_jax.run.opening import setup_compilation_cache
from supcon_jax.run.workdir import read_config

# A path, a Pillow image, or uint8 [H, W, 3]; where several are taken, a sequence of them.
Image = Any
# Images that are prepared and encoded at a time; fewer are padded to a power of two.
BATCH = {"cpu": 64}
BATCH_OF_ACCELERATORS = 256


class Neighbour(NamedTuple):
    """A training image near to one that was given.

    Attributes:
      name: its file, or "image 12" of data in memory.
      label: its class; below 0 where it has none.
      class_name: of the label, "" where it has none.
      similarity: cosine of the two embeddings.
    """

    name: str
    label: int
    class_name: str
    similarity: float


class Prediction(NamedTuple):
    """What a classifier says of an image.

    Attributes:
      label: the class with the largest probability.
      class_name: its name.
      probabilities: `[C]`, calibrated (`reference.calibrate`).
      neighbours: the nearest training images, the nearest first.
      distance: to the k-th nearest training image, of unit length, as
        `ood.knn_scores` has it.
      unlike: whether the distance is above that of 99 % of the evaluation images.
    """

    label: int
    class_name: str
    probabilities: np.ndarray
    neighbours: tuple[Neighbour, ...]
    distance: float
    unlike: bool


def load_model(
    workdir: str | os.PathLike[str],
    *,
    data_dir: str = "",
    data_root: str = "",
    calibration_split: str = "",
) -> Model:
    """The model of a finished run, to be used.

    Args:
      workdir: of a run of any mode; one with a classifier can predict.
      data_dir, data_root: where the run's data are now; the first prediction reads them.
      calibration_split: of the data, on which probabilities are calibrated; "": that of
        the run's evaluation.

    Raises:
      ValueError: there is no such run, or it has saved nothing, in one line.

    Example:
      model = load_model("runs/linear_digits")
      model.embed(images)  # [n, D]
    """
    workdir, config, average = _find_model(os.fspath(workdir))
    for key, value in (("dir", data_dir), ("root", data_root)):
        config.data[key] = value or config.data[key]
    config.data.eval_split = calibration_split or config.data.eval_split
    setup_compilation_cache(enabled=config.compilation_cache)
    mesh = parallel.create_mesh()
    trained = load_trained(workdir, mesh, average=average, classifier=False)
    # Of the frozen encoder alone; what comes out does not depend on it.
    config.batch_size = max(min(config.batch_size, 256) // mesh.size, 1) * mesh.size
    config.microbatch_size = config.data.lanes = 0
    return Model(workdir, config, trained, mesh, average=average)


def _find_model(workdir: str) -> tuple[str, ConfigDict, bool]:
    """The run that has the model; an evaluation is of another's.

    Returns:
      Its workdir, its config, and whether the average of its encoder is meant: where an
      evaluation says so. A run's own `encoder_average.use` is of the encoder that it
      started from.

    Raises:
      ValueError: there is no run.
    """
    theirs = read_config(workdir)
    if theirs is None:
        raise ValueError(f"no run in {workdir!r}; give the workdir of a finished run")
    if theirs.get("mode") in ("evaluate", "robustness"):
        used, config, _ = _find_model(find_used_run(theirs["pretrained"], workdir))
        return used, config, config_of(theirs).encoder_average.use
    return workdir, config_of(theirs), False


class Model:
    """A trained encoder, with its classifier where the run has one.

    Attributes:
      workdir: of the run.
      config: of the run.
      trained: its modules and arrays.
      mesh: the devices.
      average: whether its encoder is the average of the run's steps.
    """

    def __init__(
        self,
        workdir: str,
        config: ConfigDict,
        trained: TrainedModel,
        mesh: Mesh,
        *,
        average: bool = False,
    ):
        self.workdir, self.config, self.trained = workdir, config, trained
        self.mesh, self.average = mesh, average
        self._predictors: dict[int, Predictor] = {}
        self._most = BATCH.get(parallel.platform(mesh), BATCH_OF_ACCELERATORS)

    @functools.cached_property
    def reference(self) -> Reference:
        """Training embeddings, temperature and class names; the first time from the data.

        Raises:
          ValueError: the run has no classifier, or its data are not there.
        """
        if self.trained.head is None:
            raise ValueError(no_classifier(self.config, self.workdir))
        return open_reference(self.workdir, self.config, self.trained, self.mesh)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in the order of the probabilities."""
        return self.reference.class_names

    def embed(self, images: Image) -> np.ndarray:
        """Embeddings `[n, D]` float32: what the run's classifier reads.

        That is the encoder's output, or the projection where the run was made with
        `representation="projection"`.

        Args:
          images: paths, Pillow images and uint8 arrays `[H, W, 3]`, or one of them. An
            array that has the run's size already is taken as it is.

        Raises:
          ValueError: one of them is no image that can be read, which is named.
        """
        parts = []
        for pixels, failed in self.prepare(images):
            for name, reason in failed.items():
                raise ValueError(f"cannot read {name}: {reason}")
            parts.append(self.encode(pixels))
        return np.concatenate(parts)

    def predict(self, images: Image, *, neighbours: int = 5) -> list[Prediction]:
        """Classes with calibrated probabilities, and what they rest on.

        Args:
          images: as for `embed`.
          neighbours: nearest training images that are named.

        Raises:
          ValueError: the run has no classifier (its line says what makes one), its data
            are not there at the first call, or one is no image that can be read.
        """
        _ = self.reference  # refuses before images are read
        return self.judge(self.embed(images), neighbours=neighbours)

    def prepare(self, images: Image) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
        """Images as the evaluation sees them, some at a time, the next ones in threads.

        Yields:
          Those that can be read, uint8 `[m, S, S, 3]`, and why the others cannot be.
        """
        if isinstance(images, str | os.PathLike) or hasattr(images, "getexif"):
            images = [images]
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images = images[None]
        numbered = list(enumerate(images))
        if not numbered:
            raise ValueError("no images were given")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            chunks = [
                numbered[start : start + self._most]
                for start in range(0, len(numbered), self._most)
            ]
            coming = pool.map(self._prepare, chunks[0])
            for following in [*chunks[1:], []]:
                prepared = list(coming)
                coming = pool.map(self._prepare, following)
                pixels = [image for image in prepared if isinstance(image, np.ndarray)]
                failed = dict(x for x in prepared if not isinstance(x, np.ndarray))
                size = self.config.data.image_size
                shape = (len(pixels), size, size, 3)
                yield np.asarray(pixels, np.uint8).reshape(shape), failed

    def _prepare(self, numbered: tuple[int, Image]) -> np.ndarray | tuple[str, str]:
        """An image, or its name and why it cannot be read."""
        number, image = numbered
        is_path = isinstance(image, str | os.PathLike)
        name = os.fspath(image) if is_path else f"image {number}"
        size, resize = self.config.data.image_size, self.config.data.eval_resize
        try:
            if is_path:
                with storage.open_file(name) as file:
                    image = decode(file)
            elif hasattr(image, "getexif"):
                image = decode(image)
            else:
                image = _checked(np.asarray(image))
                if image.shape == (size, size, 3):
                    return image
            return central_crop(image, image_size=size, resize=resize)
        except OSError as error:
            return name, error.strerror or str(error)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings `[n, D]` of images as `prepare` gives them, `[n, S, S, 3]` uint8."""
        parts = [
            self._encode(pixels[at : at + self._most])
            for at in range(0, len(pixels), self._most)
        ]
        return np.concatenate(parts)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        size = self.mesh.size
        while size < len(pixels):  # few shapes, so that few programs are compiled
            size *= 2
        if size not in self._predictors:
            data = self.config.data
            self._predictors[size] = Predictor(
                self.trained.encoder,
                None,
                normalize=builders.build_normalization(self.config),
                mesh=self.mesh,
                batch_size=size,
                image_size=data.image_size,
                resize=data.eval_resize,
            )
        labels = np.full(len(pixels), UNLABELLED, np.int32)
        source = ArraySource(pixels, labels, self.trained.num_classes)
        encoder = {"encoder": self.trained.variables["encoder"]}
        return self._predictors[size].embed(encoder, source)[0].astype(np.float32)

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """What the classifier says of embeddings `[n, D]`, `[n, C]`."""
        return logits_of(self.trained, embeddings)

    def judge(self, embeddings: np.ndarray, *, neighbours: int = 5) -> list[Prediction]:
        """`predict` for embeddings `[n, D]`."""
        reference = self.reference
        facts, names = reference.facts, reference.class_names
        logits = self.logits(embeddings)
        probabilities = np.exp(
            log_probabilities(logits, temperature=facts["temperature"])
        )
        near = _nearest(reference, embeddings, max(neighbours, facts["neighbour"]))
        found = []
        for p, cosines, rows in zip(probabilities, *near, strict=True):
            label = int(p.argmax())
            cosine = float(cosines[facts["neighbour"] - 1])
            distance = float(np.sqrt(max(2.0 - 2.0 * cosine, 0.0)))
            found.append(
                Prediction(
                    label=label,
                    class_name=names[label],
                    probabilities=p,
                    neighbours=tuple(
                        Neighbour(
                            name=str(reference.names[row]),
                            label=int(reference.labels[row]),
                            class_name=_class_name(names, int(reference.labels[row])),
                            similarity=float(cosine),
                        )
                        for row, cosine in zip(
                            rows[:neighbours], cosines[:neighbours], strict=True
                        )
                    ),
                    distance=distance,
                    unlike=distance > facts["threshold"],
                )
            )
        return found


def _checked(image: np.ndarray) -> np.ndarray:
    """Refuses an array that is no image.

    Raises:
      ValueError: naming what it is.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"got an image that is {image.dtype} {list(image.shape)}; allowed: paths, "
            "Pillow images, and arrays uint8 [H, W, 3] of values 0 to 255"
        )
    return image


def _nearest(
    reference: Reference, embeddings: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows of the k nearest training images, `[n, k]` each."""
    k = min(k, len(reference.embeddings))
    found = list(neighbours(reference.embeddings, embeddings, k=k))
    cosines, rows = (np.concatenate([part[i] for part in found]) for i in (1, 2))
    return cosines, rows


def _class_name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label >= 0 else ""
