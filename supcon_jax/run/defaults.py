"""What a config leaves to a folder of images, chosen once by stated rules.

The keys are `keys.OPEN`. What is chosen is said with its reason and becomes the run's
config, so config.json has it and a run that goes on, on whatever devices, keeps it.
"""

from __future__ import annotations

import logging
import math
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import parallel, storage
from supcon_jax.checkpoint import saved_steps
from supcon_jax.config.check import flatten, open_keys
from supcon_jax.config.keys import IMAGE_FOLDERS, KEYS, RANDOM, SPLIT_KEYS
from supcon_jax.data.folders import find_eval_split
from supcon_jax.data.images import read_size
from supcon_jax.data.sources import READERS, FileSource, Source
from supcon_jax.run import memory
from supcon_jax.run.opening import agree_on_config, plan_for, setup_compilation_cache
from supcon_jax.run.splits import open_sources
from supcon_jax.run.workdir import finished_metrics, read_config

logger = logging.getLogger(__name__)
# Held out where a folder has no split to evaluate on: one image of five.
HELD_OUT = 0.2
# Photos whose headers are read for their size.
SAMPLED = 256
# Smaller photos are enlarged: a ResNet's stride of 32 leaves a side of 2.
SIDES = (64, 96, 128, 160, 192, 224)
# Twelve times less work than 224, which a CPU would take hours for.
CPU_SIDE = 64
LARGEST_BATCH = 256
# Training images that a run sees, each as often as `EPOCHS` allows.
IMAGES_SEEN = 100_000
EPOCHS = (50, 200)
# Keys of the images that an encoder's or a classifier's run has decided.
OF_IMAGES = ("data.image_size", "data.eval_resize")


def resolve(config: ConfigDict, workdir: str | pathlib.Path = "") -> ConfigDict:
    """The config with a value for every key that it leaves to its folder.

    A run that goes on has what it had; a run on another one's model has that one's images
    and, on the same folder, its split. All else is chosen.

    Args:
      config: a checked config.
      workdir: of the run; "" for one that nothing was saved of.

    Raises:
      ValueError: the folder cannot be used, or not even the smallest batch fits into
        memory, in one line.
    """
    if not open_keys(config):
        return config
    agree_on_config(config)
    setup_compilation_cache(enabled=config.compilation_cache)
    mesh = parallel.create_mesh()
    config = ConfigDict(config)
    _take_from_begun_run(config, workdir)
    _take_from_pretrained(config)
    if config.data.eval_split == "auto":
        _choose_split(config)
    if open_keys(config):
        # The batch is not known yet, and any would do to open the data.
        opened = ConfigDict(config)
        opened.batch_size = opened.batch_size or 1
        train, _ = open_sources(opened)
        _choose_image_size(config, train, parallel.platform(mesh))
        _choose_epochs(config, train)
        _choose_batch_size(config, train, mesh)  # last: it may compile the step
    return config


def _take_from_begun_run(config: ConfigDict, workdir: str | pathlib.Path) -> None:
    """Open keys have the values with which the run in a workdir began, if one has."""
    theirs = read_config(workdir) if workdir else None
    if theirs is None or not (saved_steps(workdir) or finished_metrics(workdir)):
        return
    keys = open_keys(config)
    if "data.eval_split" in keys:
        keys += _untouched(config, SPLIT_KEYS)
    _take(config, keys, theirs, f"the run in {workdir} began so")


def _take_from_pretrained(config: ConfigDict) -> None:
    """Images are prepared as for the model that a run uses, and split as there."""
    used = config.pretrained
    theirs = read_config(used) if used not in ("", RANDOM) else None
    if theirs is None:
        return
    keys = [key for key in OF_IMAGES if key in open_keys(config)]
    data = theirs["data"]
    places = (storage.absolute(root) for root in (config.data.root, data["root"]))
    same_folder = data["name"] in IMAGE_FOLDERS and len({*places}) == 1
    if config.data.eval_split == "auto" and same_folder:
        keys += ["data.eval_split", *_untouched(config, SPLIT_KEYS)]
    _take(config, keys, theirs, f"as in {used}")


def _untouched(config: ConfigDict, keys: Iterable[str]) -> list[str]:
    """Those of the keys that nobody has given another value than the default."""
    flat = flatten(config.to_dict())
    return [key for key in keys if flat[key] == KEYS[key].default]


def _take(
    config: ConfigDict, keys: list[str], theirs: dict[str, Any], why: str
) -> None:
    flat = flatten(theirs)
    changes = {key: flat[key] for key in dict.fromkeys(keys) if key in flat}
    if changes:
        config.update_from_flattened_dict(changes)
        _say(", ".join(f"{key}={value!r}" for key, value in changes.items()), why)


def _choose_split(config: ConfigDict) -> None:
    """What is evaluated on: a split that the folder has, or a share of its images."""
    if config.data.validation_fraction:
        config.data.eval_split = config.data.train_split  # a share of it
        return
    found = find_eval_split(config.data.root)
    if found is not None:
        config.data.eval_split = found
        _say(f"data.eval_split={found!r}", "the folder has it")
        return
    config.data.eval_split = config.data.train_split
    config.data.validation_fraction = HELD_OUT
    _say(
        f"data.validation_fraction={HELD_OUT}",
        "the folder has no split to evaluate on; this share "
        + ("of every class, " if config.data.name == "folder" else "")
        + "chosen by data.split_seed, is not trained on",
    )


def _choose_image_size(config: ConfigDict, train: Source, platform: str) -> None:
    """The largest of `SIDES` that most photos have, and a crop as ImageNet's of it."""
    if config.data.image_size and config.data.eval_resize:
        return
    side = _short_side(train)
    if not config.data.image_size:
        most = CPU_SIDE if platform == "cpu" else SIDES[-1]
        fitting = [s for s in SIDES if s <= min(side, most)]
        config.data.image_size = (fitting or SIDES)[-1 if fitting else 0]
        _say(
            f"data.image_size={config.data.image_size}",
            f"the photos' median short side is {side} pixels"
            + (
                f", and a CPU is slow above {CPU_SIDE}"
                if side > most == CPU_SIDE
                else ""
            ),
        )
    if not config.data.eval_resize:
        # 256 for 224. Photos that are no larger have no border to cut off.
        resize = round(config.data.image_size * 8 / 7)
        config.data.eval_resize = resize if resize <= side else config.data.image_size
        _say(
            f"data.eval_resize={config.data.eval_resize}",
            "8/7 of the image size" if resize <= side else "the photos are no larger",
        )


def _short_side(train: Source) -> int:
    """Median short side in pixels of some photos; names those without a readable header.

    Raises:
      ValueError: none has.
    """
    assert isinstance(train, FileSource)  # `check._check_open`
    count = min(SAMPLED, train.num_examples)
    rows = np.linspace(0, train.num_examples - 1, count).astype(int)

    def size(path: str) -> tuple[int, int] | None:
        with storage.open_file(path) as file:
            return read_size(file)

    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(size, map(str, train.paths[rows])))
    known = [min(size) for size in sizes if size]
    broken = [
        train.name(row) for row, size in zip(rows, sizes, strict=True) if not size
    ]
    named = ", ".join(broken[:3]) + (", ..." if broken[3:] else "")
    if not known:
        raise ValueError(
            f"none of {count} images looked at can be read: {named} (--config.data.root)"
        )
    if broken:
        logger.warning(
            "warning: %d of %d images looked at cannot be read: %s; %s",
            len(broken),
            count,
            named,
            "other images take their place (--config.data.skip_errors)"
            if train.unreadable.skip
            else "the first that is needed ends the run (--config.data.skip_errors=True)",
        )
    return int(np.median(known))


def _choose_batch_size(config: ConfigDict, train: Source, mesh: Mesh) -> None:
    """The largest that takes half of the images at most, and that fits into memory."""
    if config.batch_size:
        return
    # Devices and the classes of a balanced batch share it evenly.
    sizes = [math.lcm(mesh.size, config.data.classes_per_batch or 1)]
    while 2 * sizes[-1] <= min(LARGEST_BATCH, train.num_examples // 2):
        sizes.append(2 * sizes[-1])
    config.batch_size = sizes.pop()
    why = f"at most {LARGEST_BATCH} and half of {train.num_examples:,} training images"
    while sizes and not _fits(config, train, mesh):
        config.batch_size = sizes.pop()
        why = "as many as fit into the device's memory"
    _say(f"batch_size={config.batch_size}", why)


def _fits(config: ConfigDict, train: Source, mesh: Mesh) -> bool:
    """Whether a step fits into memory; what is compiled for it is kept for the run."""
    plan = plan_for(config, mesh, train)
    limit = memory.device_memory(mesh.local_mesh.devices.flat[0])
    try:
        needs = memory.step_memory(plan.lower().compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return needs is None or limit is None or sum(needs) <= limit


def _choose_epochs(config: ConfigDict, train: Source) -> None:
    """So many that a run sees `IMAGES_SEEN` images, within bounds."""
    if config.epochs:
        return
    low, high = EPOCHS
    wanted = round(IMAGES_SEEN / train.num_examples)
    config.epochs = float(min(max(wanted, low), high))
    if not config.total_steps:
        _say(
            f"epochs={config.epochs:g}",
            f"each of {train.num_examples:,} training images as often as makes "
            f"{IMAGES_SEEN:,}, but {low} to {high} times",
        )


def _say(what: str, why: str) -> None:
    logger.info("chosen: %s (%s)", what, why)
