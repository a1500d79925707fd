"""Images of runs, and how their encoders place them: maps, neighbours, hard examples."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from supcon_jax import builders, parallel, storage
from supcon_jax.checkpoint import digest, restore_encoder
from supcon_jax.config.check import config_of
from supcon_jax.config.keys import TRAINING_MODES
from supcon_jax.data.identity import identify
from supcon_jax.data.pipeline import eval_batches
from supcon_jax.data.sources import READ_AT_START_BYTES, ArraySource, Source
from supcon_jax.evaluation.calibration import log_probabilities
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.logs import progress
from supcon_jax.losses import supcon_loss
from supcon_jax.page.records import RunRecord
from supcon_jax.pretrained.model import SavedEncoder, find_encoder
from supcon_jax.run.splits import open_eval_source
from supcon_jax.run.workdir import read_config, read_facts, refuse_other_data

logger = logging.getLogger(__name__)
PyTree = Any
# Images of a map: more cannot be told apart, and t-SNE of 2,000 takes 10 s on two cores.
MOST_IMAGES = 2000
HARDEST, QUERIES, NEIGHBOURS = 24, 10, 8
BATCH_SIZE = 256
# Thumbnails: their largest side, and how many stand in a row of the one picture of all.
SIDE, COLUMNS = 48, 50
# Keys of the data that say nothing of the evaluation split's images.
OF_TRAINING = ("views", "mean", "std", "lanes", "keep_gib", "classes_per_batch")


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of one split that are shown.

    Attributes:
      images: as the encoder sees them, in memory, with their labels.
      rows: `[m]` places in the split, rising.
      sampled: `[m]` whether an image belongs to the maps.
    """

    images: ArraySource
    rows: np.ndarray
    sampled: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where they have none."""
        count = self.images.num_classes
        return self.images.class_names or tuple(map(str, range(count)))

    def tile(self, row: int) -> int | None:
        """The place of an image of the split among those that are shown."""
        place = int(np.searchsorted(self.rows, row))
        known = place < len(self.rows) and self.rows[place] == row
        return place if known else None


@dataclasses.dataclass(frozen=True)
class EmbeddingView:
    """How an encoder places the images of a gallery.

    Attributes:
      encoder: where it is, in words.
      runs: names of the runs that use it.
      gallery: number of the gallery.
      places: `[n]` of the images in the gallery, those of the map.
      maps: method -> `[n, 2]`.
      neighbours: place of an image, and those of its nearest with their cosines.
      hardest: place of an image and its contrastive loss, the largest first.
    """

    encoder: str
    runs: list[str]
    gallery: int
    places: np.ndarray
    maps: dict[str, np.ndarray]
    neighbours: list[tuple[int, list[tuple[int, float]]]]
    hardest: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Everything of a report that needs images.

    Attributes:
      galleries: one for each split.
      gallery_of: name of a run -> number of its gallery.
      views: one for each encoder and split.
      problems: why runs have no pictures, with their names in front.
    """

    galleries: list[Gallery] = dataclasses.field(default_factory=list)
    gallery_of: dict[str, int] = dataclasses.field(default_factory=dict)
    views: list[EmbeddingView] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def take_pictures(runs: list[RunRecord]) -> Pictures:
    """Opens data and encoders of runs; what cannot be opened is a problem, told.

    Args:
      runs: of a report; those with equal data or encoders share them.
    """
    found, reasons = Pictures(), _Reasons()
    _read_galleries(runs, found, reasons)
    _embed_galleries(runs, found, reasons)
    found.problems.extend(f"{', '.join(n)}: {reason}" for reason, n in reasons.items())
    return found


class _Reasons(dict[str, list[str]]):
    """Why there are no pictures -> names of the runs."""

    def add(self, reason: str, names: Iterable[str]) -> None:
        self.setdefault(reason, []).extend(names)


def _read_galleries(runs: list[RunRecord], found: Pictures, reasons: _Reasons) -> None:
    """Fills in the images of each split that the runs have."""
    sources: dict[str, Source] = {}
    users: dict[str, list[RunRecord]] = {}
    for run in runs:
        try:
            users.setdefault(_open_data(run, sources), []).append(run)
        except (ValueError, OSError) as error:
            reasons.add(f"no pictures: {error}", [run.name])
    for key, of_data in users.items():
        names = [run.name for run in of_data]
        try:
            gallery = _read_gallery(sources.pop(key), of_data)
        except (ValueError, OSError) as error:
            reasons.add(f"no pictures: {error}", names)
            continue
        found.gallery_of.update(dict.fromkeys(names, len(found.galleries)))
        found.galleries.append(gallery)


def _embed_galleries(runs: list[RunRecord], found: Pictures, reasons: _Reasons) -> None:
    """Fills in how each encoder of the runs places the images of their split."""
    mesh = parallel.create_mesh()
    # An encoder and a gallery -> names of runs, and the digests that they have noted.
    users: dict[tuple[SavedEncoder, int], dict[str, str]] = {}
    for run in runs:
        if run.name in found.gallery_of:
            try:
                saved, noted = find_encoder(run.workdir)
            except ValueError as error:
                reasons.add(f"no map: {error}", [run.name])
            else:
                same = saved, found.gallery_of[run.name]
                users.setdefault(same, {})[run.name] = noted
    for (saved, number), digests in users.items():
        try:
            variables = restore_encoder(
                saved.workdir,
                average=saved.average,
                sharding=parallel.replicated(mesh),
            )
        except ValueError as error:
            reasons.add(f"no map: {error}", digests)
            continue
        now = digest((variables,))
        names = [name for name, noted in digests.items() if noted in ("", now)]
        if others := digests.keys() - names:
            reason = f"no map: the encoder in {saved.workdir} is another one by now"
            reasons.add(reason, sorted(others))
        if not names:
            continue
        gallery = found.galleries[number]
        try:
            view = _view(saved, variables, names, number, gallery, mesh)
        except Exception as error:  # of encoders of all kinds; the page has all else
            why = next(iter(str(error).splitlines()), type(error).__name__)
            size = gallery.images.images.shape[1]
            reason = f"no map: {saved.workdir} on images of {size} pixels: {why}"
            reasons.add(reason, names)
        else:
            found.views.append(view)


def losses_of(run: RunRecord) -> np.ndarray:
    """The negative log-likelihood of each of a run's predictions, `[n]`."""
    assert run.predictions is not None
    logits, labels, _ = run.predictions
    return -log_probabilities(logits)[np.arange(len(labels)), labels]


def hardest_of(run: RunRecord, count: int = HARDEST) -> np.ndarray:
    """Places among a run's predictions of those with the largest loss, worst first."""
    return np.argsort(-losses_of(run), kind="stable")[:count]


def sprite(gallery: Gallery) -> tuple[str, int, int]:
    """All thumbnails in one picture: its data URL, the side of a tile, and the rows."""
    from PIL import Image

    images = gallery.images.images
    side = min(SIDE, images.shape[1])
    rows = -(-len(images) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * side, rows * side))
    for place, image in enumerate(images):
        tile = Image.fromarray(image)
        if tile.width != side:
            tile = tile.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(tile, (place % COLUMNS * side, place // COLUMNS * side))
    content = io.BytesIO()
    # JPEG works in blocks of 16 pixels, and leaves little of an image that is not larger.
    small = side < 32
    if small:
        picture.save(content, format="PNG", optimize=True)
    else:
        picture.save(content, format="JPEG", quality=78)
    encoded = base64.b64encode(content.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{encoded}", side, rows


def _open_data(run: RunRecord, sources: dict[str, Source]) -> str:
    """Opens a run's evaluation split, unless a run before it has; returns its name.

    Raises:
      ValueError: it cannot be opened, or is not the one that the run had.
    """
    config = run.config
    data = {k: v for k, v in config.data.to_dict().items() if k not in OF_TRAINING}
    key = json.dumps(data, sort_keys=True)
    if config.data.fake:
        raise ValueError("it trained on noise (--config.data.fake)")
    if key not in sources:
        source = open_eval_source(config)
        if source.synthetic:
            raise ValueError("its data are noise (--config.data.name)")
        sources[key] = source
    source = sources[key]
    known = read_facts(run.workdir).get("data", {})
    now = identify(source)
    # Labels of a large split are read here, and were not where training began.
    if (source.num_bytes or 0) > READ_AT_START_BYTES and config.mode in TRAINING_MODES:
        now["digest"] = known.get("evaluation", now)["digest"]
    refuse_other_data(run.workdir, {"evaluation": now}, known)
    return key


def _read_gallery(source: Source, runs: list[RunRecord]) -> Gallery:
    """Decodes a sample of a split, and the hardest examples of runs with predictions."""
    config = runs[0].config
    labelled = np.flatnonzero(source.labels >= 0)
    order = np.random.default_rng(0).permutation(labelled)
    sample = order[:MOST_IMAGES]
    hard = [
        run.predictions.ids[hardest_of(run)]
        for run in runs
        if run.predictions is not None
    ]
    rows = np.unique(np.concatenate([sample, *hard]).astype(int))
    rows = rows[(rows >= 0) & (rows < source.num_examples)]
    batches = eval_batches(
        source.take_rows(rows),
        batch_size=BATCH_SIZE,
        image_size=config.data.image_size,
        resize=config.data.eval_resize,
    )
    total = -(-len(rows) // BATCH_SIZE)
    images, masks = [], []
    for batch in progress(batches, total=total, label="reading images"):
        images.append(batch["image"][:, 0])
        masks.append(batch["mask"] > 0)
    kept = np.concatenate(masks)[: len(rows)]
    rows = rows[kept]
    shown = ArraySource(
        np.concatenate(images)[: len(kept)][kept],
        source.labels[rows],
        source.num_classes,
        source.class_names,
    )
    return Gallery(shown, rows, np.isin(rows, sample))


def _view(
    saved: SavedEncoder,
    variables: PyTree,
    names: list[str],
    number: int,
    gallery: Gallery,
    mesh: Mesh,
) -> EmbeddingView:
    """Embeds the images of a gallery and looks at what lies where."""
    config = config_of(read_config(saved.workdir) or {})
    size = gallery.images.images.shape[1]  # that of the runs, cropped already
    predictor = Predictor(
        builders.build_encoder(config, parallel.platform(mesh)),
        None,
        normalize=builders.build_normalization(config),
        mesh=mesh,
        batch_size=max(BATCH_SIZE // mesh.size, 1) * mesh.size,
        image_size=size,
        resize=size,
    )
    title = f"{storage.shown(saved.workdir)}, step {saved.step:,}"
    logger.info("embedding %s images: %s", f"{len(gallery.rows):,}", title)
    embeddings, labels = predictor.embed({"encoder": variables}, gallery.images)
    places = np.flatnonzero(gallery.sampled)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = (embeddings / np.maximum(lengths, 1e-12))[places].astype(np.float32)
    labels = labels[places]
    losses = np.asarray(
        supcon_loss(
            unit[:, None],
            labels,
            temperature=config.loss.temperature,
            reduction="none",
        )
    )
    worst = np.argsort(-losses, kind="stable")[:HARDEST]
    return EmbeddingView(
        encoder=title + (" (its average)" if saved.average else ""),
        runs=names,
        gallery=number,
        places=places,
        maps=_maps(unit),
        neighbours=[
            (int(places[query]), [(int(places[n]), cosine) for n, cosine in nearest])
            for query, nearest in _neighbours(unit, labels)
        ],
        hardest=[(int(places[w]), float(losses[w])) for w in worst],
    )


def _maps(unit: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings of unit length in two dimensions, by PCA and by t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if min(unit.shape) < 2:
        return {}
    components = min(50, *unit.shape)
    reduced = PCA(components, random_state=0).fit_transform(unit)
    maps = {"PCA": reduced[:, :2]}
    if len(unit) >= 10:
        logger.info("t-SNE of %s embeddings", f"{len(unit):,}")
        start = time.monotonic()
        perplexity = min(30.0, (len(unit) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
        # Its threads wait for each other busily: on two busy cores 5 times as long.
        with threadpool_limits(1):
            maps["t-SNE"] = tsne.fit_transform(reduced)
        logger.info("t-SNE took %.0f s", time.monotonic() - start)
    return maps


def _neighbours(
    unit: np.ndarray, labels: np.ndarray
) -> list[tuple[int, list[tuple[int, float]]]]:
    """The first image of up to `QUERIES` classes, and its nearest by cosine."""
    classes, first = np.unique(labels, return_index=True)
    chosen = first[
        np.linspace(0, len(classes) - 1, min(QUERIES, len(classes))).astype(int)
    ]
    found = []
    for query in chosen.tolist():
        cosine = unit @ unit[query]
        cosine[query] = -np.inf
        nearest = np.argsort(-cosine, kind="stable")[: min(NEIGHBOURS, len(unit) - 1)]
        found.append((query, [(int(n), float(cosine[n])) for n in nearest]))
    return found
