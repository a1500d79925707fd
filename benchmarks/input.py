"""What the host's input pipeline costs, beside a Pillow pipeline of the same policy.

    python -m benchmarks.input --data_dir=DIR            # ImageNet JPEGs, 224 px
    python -m benchmarks.input --data_dir=DIR --cifar    # and CIFAR-10, 32 px
    python -m benchmarks.input --data_dir=DIR --policies # policies on host and in step

Two views of every image; CPU milliseconds a source image (all threads of the process),
images/s a core, and the ratio of CPU times. Pillow stands for the loaders that
torchvision users write: decode once, crop and resize each view, the policy's operations
one after the other, to normalised floats, in one process. Rounds alternate between the
two. What the augmentation leaves to the jitted step (jitter, grayscale, blur) is timed on
this machine's CPU in a column of its own; on an accelerator it is a small share of the
encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import itertools
import math
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from configs import common
from supcon_jax.data import views as view_options
from supcon_jax.data.augment import augment_batch
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import load_small, train_batches
from supcon_jax.data.sampler import shuffled
from supcon_jax.data.views import Augmentation

SIZE, VIEWS, BATCH = 224, 2, 32
PILLOW_MEAN = np.float32([0.485, 0.456, 0.406])[:, None, None]
PILLOW_STD = np.float32([0.229, 0.224, 0.225])[:, None, None]
POLICIES = (
    "identity",
    "auto_augment",
    "rand_augment",
    "sim_augment",
    "stacked_rand_augment",
)


def augmentation(policy: str, **changes) -> Augmentation:
    """One of the paper's augmentations; all begin with crop and flip."""
    jitter, host_policy, grayscale, blur = common.AUGMENTATIONS[policy]
    options = Augmentation(
        jitter_strength=1.0 if jitter else 0.0,
        jitter_probability=jitter,
        policy=host_policy,
        grayscale_probability=grayscale,
        blur_probability=blur,
    )
    return dataclasses.replace(options, **changes)


def ours(source, policy: str) -> Iterator[dict[str, np.ndarray]]:
    """The host's batches under one of the paper's augmentations."""
    return train_batches(
        source,
        shuffled(source.num_examples, BATCH, seed=0),
        batch_size=BATCH,
        image_size=SIZE,
        views=VIEWS,
        augmentation=augmentation(policy),
        seed=0,
    )


def in_step(
    options: Augmentation, *, whole_images: bool, chunk_size: int | None = None
) -> Callable:
    """The jitted part of an augmentation."""
    return jax.jit(
        functools.partial(
            augment_batch,
            augmentation=options.step_part(whole_images=whole_images),
            seed=0,
            views=VIEWS,
            chunk_size=chunk_size,
        )
    )


# --- Pillow ---


def pillow_crop(image: Image.Image) -> Image.Image:
    """Random resized crop and flip."""
    width, height = image.size
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * width * height
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    view = image.resize(
        (SIZE, SIZE), Image.BILINEAR, box=(left, top, left + w, top + h)
    )
    if random.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def pillow_jitter(image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order, four times in five."""
    if random.random() >= 0.8:
        return image

    def hue(x: Image.Image) -> Image.Image:
        h, s, v = x.convert("HSV").split()
        shift = int(random.uniform(-0.2, 0.2) * 255)
        h = Image.fromarray((np.asarray(h).astype(np.int16) + shift).astype(np.uint8))
        return Image.merge("HSV", (h, s, v)).convert("RGB")

    def enhance(kind) -> Callable:
        return lambda x: kind(x).enhance(random.uniform(0.2, 1.8))

    operations = [
        enhance(ImageEnhance.Brightness),
        enhance(ImageEnhance.Contrast),
        enhance(ImageEnhance.Color),
        hue,
    ]
    for operation in random.sample(operations, 4):
        image = operation(image)
    return image


def _affine(*matrix: float) -> Callable:
    return lambda x: x.transform(
        x.size, Image.Transform.AFFINE, matrix, fillcolor=(128,) * 3
    )


def _sign(value: float) -> float:
    return random.choice((-1, 1)) * value


def pillow_operation(name: str, level: float, translate: float) -> Callable:
    """An operation of AutoAugment at a level 0..10."""
    factor = 1.8 * level / 10 + 0.1
    shear, pixels = _sign(0.3 * level / 10), _sign(translate * level / 10)
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Rotate": lambda x: x.rotate(_sign(3.0 * level), fillcolor=(128,) * 3),
        "Posterize": lambda x: ImageOps.posterize(x, max(1, int(4 * level / 10))),
        "Solarize": lambda x: ImageOps.solarize(x, int(25.6 * level)),
        "SolarizeAdd": lambda x: x.point(
            [min(255, v + int(11 * level)) if v < 128 else v for v in range(256)] * 3
        ),
        "Color": lambda x: ImageEnhance.Color(x).enhance(factor),
        "Contrast": lambda x: ImageEnhance.Contrast(x).enhance(factor),
        "Brightness": lambda x: ImageEnhance.Brightness(x).enhance(factor),
        "Sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(factor),
        "ShearX": _affine(1, shear, 0, 0, 1, 0),
        "ShearY": _affine(1, 0, 0, shear, 1, 0),
        "TranslateX": _affine(1, 0, pixels, 0, 1, 0),
        "TranslateY": _affine(1, 0, 0, 0, 1, pixels),
        "Cutout": lambda x: _cutout(x, int(4 * level)),
    }[name]


def _cutout(image: Image.Image, half: int) -> Image.Image:
    image = image.copy()
    x, y = random.randrange(SIZE), random.randrange(SIZE)
    image.paste((128,) * 3, (x - half, y - half, x + half, y + half))
    return image


def pillow_auto_augment(image: Image.Image) -> Image.Image:
    """One of the 25 sub-policies."""
    from supcon_jax.data.operations import POLICY_V0

    for name, probability, level in random.choice(POLICY_V0):
        if random.random() < probability:
            image = pillow_operation(name, level, 250)(image)
    return image


def pillow_rand_augment(image: Image.Image) -> Image.Image:
    """Two of sixteen operations and the identity, magnitude 10."""
    names = (
        "AutoContrast Equalize Invert Rotate Posterize Solarize Color Contrast "
        "Brightness Sharpness ShearX ShearY TranslateX TranslateY Cutout SolarizeAdd"
    ).split()
    for name in random.choices([*names, None], k=2):
        if name:
            image = pillow_operation(name, 10, 100)(image)
    return image


def pillow_views(encoded: bytes, policy: str) -> np.ndarray:
    """Two views of one encoded image, all of the policy on the host."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    jitter, host_policy, grayscale, blur = common.AUGMENTATIONS[policy]
    views = []
    for _ in range(VIEWS):
        view = pillow_crop(image)
        if jitter:
            view = pillow_jitter(view)
        if host_policy == "auto_augment":
            view = pillow_auto_augment(view)
        if host_policy == "rand_augment":
            view = pillow_rand_augment(view)
        if random.random() < grayscale:
            view = view.convert("L").convert("RGB")
        if random.random() < blur:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        # As ToTensor and Normalize do; in our pipeline this is done in the step.
        pixels = np.asarray(view, np.float32).transpose(2, 0, 1) / 255
        views.append((pixels - PILLOW_MEAN) / PILLOW_STD)
    return np.stack(views)


def pillow_all(encoded: list[bytes], policy: str) -> int:
    """Two views of every image."""
    for image in encoded:
        pillow_views(image, policy)
    return len(encoded)


# --- measuring ---


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """CPU and wall milliseconds an image, of work that says how many it made."""
    cpu, wall = time.process_time(), time.perf_counter()
    count = work()
    return (
        1e3 * (time.process_time() - cpu) / count,
        1e3 * (time.perf_counter() - wall) / count,
    )


def consume(batches: Iterator[dict[str, np.ndarray]], steps: int) -> int:
    """Draws so many batches."""
    return sum(len(batch["label"]) for batch in itertools.islice(batches, steps))


def step_milliseconds(function: Callable, images: np.ndarray) -> float:
    """CPU milliseconds a source image of the jitted part."""
    ids = np.stack([np.zeros(len(images), int), np.arange(len(images))], 1)
    ids = ids.astype(np.int32)
    function(images, ids).block_until_ready()

    def work() -> int:
        for _ in range(3):
            function(images, ids).block_until_ready()
        return 3 * len(images)

    return statistics.median(measured(work)[0] for _ in range(3))


def imagenet(data_dir: str, rounds: int) -> None:
    """The table of ImageNet JPEGs at 224 px."""
    source = open_source("imagenet2012", "train", dir=data_dir)
    encoded = [
        source.read(index).image for index in range(min(128, source.num_examples))
    ]
    mean_kib = sum(map(len, encoded)) / len(encoded) / 1024
    print(f"\nImageNet JPEGs (mean {mean_kib:.0f} KiB), two views at {SIZE} px\n")
    print(
        "| augmentation | host CPU-ms / image | images/s / core | in step, CPU-ms "
        "| Pillow CPU-ms | Pillow / host | Pillow / (host + step) |"
    )
    print("|---|---|---|---|---|---|---|")
    for policy in POLICIES:
        random.seed(0)
        host, peer = [], []
        for _ in range(rounds):
            batches = ours(source, policy)
            consume(batches, 8)  # the pipeline is traced and its buffers are filled
            host.append(measured(functools.partial(consume, batches, 24))[0])
            batch = next(batches)
            batches.close()  # or its threads would run while Pillow is timed
            pillow = functools.partial(pillow_all, encoded, policy)
            peer.append(measured(pillow)[0])
        mine, theirs = statistics.median(host), statistics.median(peer)
        device = 0.0
        if policy in ("sim_augment", "stacked_rand_augment"):
            function = in_step(augmentation(policy), whole_images=False)
            device = step_milliseconds(function, batch["image"])
        print(
            f"| {policy} | {mine:.2f} | {1e3 / mine:.0f} | {device:.2f} "
            f"| {theirs:.2f} | {theirs / mine:.2f} | {theirs / (mine + device):.2f} |",
            flush=True,
        )


def cifar(data_dir: str, rounds: int) -> None:
    """CIFAR-10 in memory: the host indexes, the step crops and augments."""
    source = load_small(open_source("cifar10", "train", dir=data_dir), 32)
    options = augmentation(
        "sim_augment", crop_area=(0.2, 1.0), jitter_strength=0.5, blur_probability=0.0
    )
    function = in_step(options, whole_images=True)
    print("\nCIFAR-10 in memory, two SimAugment views at 32 px, source images/s\n")
    print("| batch | host | in step, this CPU | one after the other |")
    print("|---|---|---|---|")
    for size in (128, 256, 512):
        batches = train_batches(
            source,
            shuffled(source.num_examples, size, seed=0),
            batch_size=size,
            image_size=32,
            views=VIEWS,
            augmentation=options,
            seed=0,
        )
        consume(batches, 2)
        host = [
            measured(functools.partial(consume, batches, 50)) for _ in range(rounds)
        ]
        step_work = functools.partial(step_all, function, next(batches))
        step_work()
        step = [measured(step_work) for _ in range(rounds)]
        host_wall, step_wall = (
            statistics.median(wall for _, wall in times) for times in (host, step)
        )
        print(
            f"| {size} | {1e3 / host_wall:,.0f} | {1e3 / step_wall:,.0f} "
            f"| {1e3 / (host_wall + step_wall):,.0f} |",
            flush=True,
        )


def policies(data_dir: str, rounds: int) -> None:
    """CIFAR-10 in memory: the same policies by TensorFlow on the host and in the step."""
    from supcon_jax.data import host, host_views

    size, batch = 32, 128
    source = load_small(open_source("cifar10", "train", dir=data_dir), size)
    sampler = shuffled(source.num_examples, batch, seed=0)
    print("\nPolicies at 32 px, with crop and flip: CPU milliseconds a view\n")
    print("| policy | host | in step, this CPU | host / step |")
    print("|---|---|---|---|")
    for policy in view_options.POLICIES:
        options = Augmentation(crop_area=(0.2, 1.0), policy=policy)
        on_host = host.batches(
            source,
            sampler,
            functools.partial(
                host_views.crop_and_augment,
                augmentation=options,
                image_size=size,
                views=VIEWS,
                seed=0,
            ),
            shape=(VIEWS, size, size, 3),
            start_step=0,
            stop_step=None,
            replace_unreadable=True,
        )
        ids = sampler(0)
        example = {"image": source.images[ids[:, 1]][:, None], "id": ids, "label": ids}
        in_step_work = functools.partial(
            step_all, in_step(options, whole_images=True, chunk_size=64), example
        )
        consume(on_host, 8)
        in_step_work()
        times = [
            (
                measured(functools.partial(consume, on_host, 20))[0] / VIEWS,
                measured(in_step_work)[0] / VIEWS,
            )
            for _ in range(rounds)
        ]
        on_host.close()
        one, other = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {policy} | {one:.3f} | {other:.3f} | {one / other:.1f} |",
            flush=True,
        )


def step_all(function: Callable, batch: dict[str, np.ndarray]) -> int:
    """Augments a batch ten times."""
    for _ in range(10):
        function(batch["image"], batch["id"]).block_until_ready()
    return 10 * len(batch["label"])


def memory(data_dir: str, steps: int) -> None:
    """Resident memory over many steps."""
    global SIZE
    SIZE = 32  # the same buffers and threads, more steps in a minute
    source = open_source("imagenet2012", "train", dir=data_dir)
    batches = ours(source, "auto_augment")
    print("\nResident memory of the input process (MiB)\n")
    consume(batches, steps // 5)
    before = resident_mib()
    for part in range(1, 5):
        consume(batches, steps // 5)
        print(f"| step {steps // 5 * (part + 1)} | {resident_mib():.1f} |", flush=True)
    slope = (resident_mib() - before) / (steps * 4 / 5) * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nslope {slope:.2f} MiB per 1,000 steps; peak {peak:.0f} MiB")


def resident_mib() -> float:
    """Memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="TFDS data directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cifar", action="store_true", help="CIFAR-10 as well")
    parser.add_argument("--policies", action="store_true", help="policies alone")
    parser.add_argument("--memory_steps", type=int, default=0, help="memory over steps")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, Pillow {Image.__version__}")
    if options.memory_steps:
        memory(options.data_dir, options.memory_steps)
        return
    if options.policies:
        policies(options.data_dir, options.rounds)
        return
    imagenet(options.data_dir, options.rounds)
    if options.cifar:
        cifar(options.data_dir, options.rounds)


if __name__ == "__main__":
    main()
