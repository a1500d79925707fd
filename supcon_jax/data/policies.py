"""AutoAugment, RandAugment and TrivialAugment in JAX, inside the jitted step.

A view gets pixel for pixel what autoaugment.py would give it on the host for the same
draws. Under vmap a branch for each operation would run all of them for every view, so
there are none. Every operation is an instance of one chain, whose links change nothing
where the operation does not need them:

1. nearest-neighbour geometry: a pixel of the image, or the filling, for each pixel;
2. one table of 256 values for each channel, which is all that brightness, contrast,
   posterize, solarize, invert, autocontrast and equalize are;
3. a blend of the pixel with its luma (color) or its neighbourhood (sharpness).

The links are two gathers, a histogram and a little arithmetic. What depends on the
operation and its level alone is computed by NumPy before the step is compiled, in float32
and in the host's order. So no product and sum of floats meet in the step unless their sum
is exact: a compiler may contract them to one operation that rounds once, not twice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.data.operations import (
    AUTO_AUGMENT_CUTOUT,
    AUTO_AUGMENT_TRANSLATE,
    FACTOR_STEPS,
    FILL,
    LUMA,
    LUMA_PER_MILLE,
    NAMES,
    POLICY_V0,
    RAND_AUGMENT_CUTOUT,
    RAND_AUGMENT_TRANSLATE,
    WIDE_LEVELS,
    WIDE_RULES,
    Rule,
    official_rules,
)
from supcon_jax.data.views import Augmentation

IDENTITY = ("Identity", 0.0)
# Operations whose table depends on the image, and those that are a blend; others are 0.
KINDS = {"Equalize": 1, "AutoContrast": 2, "Contrast": 3, "Color": 4, "Sharpness": 5}
VALUES = np.arange(256, dtype=np.float32)

Array = Any  # NumPy's, or JAX's in the step
# An operation and its argument before the sign is drawn, as the host's float32.
Row = tuple[str, float]


class Drawn(NamedTuple):
    """What is drawn for one view; L operations follow each other.

    Attributes:
      row: `[L]` int32: a row of `policy_rows`.
      negative: `[L]`: whether a signed argument is negated.
      place: `[L, 2]` in [0, 1): the centre of a cutout.
    """

    row: jax.Array
    negative: jax.Array
    place: jax.Array


class Parameters(NamedTuple):
    """What each of R operations does, whatever the image.

    Attributes:
      kind: `[R]` int32, of `KINDS`.
      across, down, shift: `[R, 2, 2, W]`, `[R, 2, 2, H]`, `[R, 2, 2]`: the source column
        and row of pixel (y, x) are `across[x] + down[y] + shift`. The second axis is the
        sign, the third column and row.
      half: `[R]` int32: half the side of a cutout; 0: none.
      product: `[R, 256]` float32: the table, or what it is before the image's share.
      share: `[R, 256]` float32: of contrast, what a mean luma adds to the product.
      weights: `[R, 3]` float32: of color, those of the luma.
      own: `[R]` float32: of color and sharpness, the weight of the pixel itself.
    """

    kind: Array
    across: Array
    down: Array
    shift: Array
    half: Array
    product: Array
    share: Array
    weights: Array
    own: Array


# --- what depends on operation and level alone ---


def _in_steps(value: Array) -> Array:
    return np.round(value * np.float32(FACTOR_STEPS)) / np.float32(FACTOR_STEPS)


def _matrix(name: str, argument: np.float32, height: int, width: int) -> np.ndarray:
    """`[2, 3]`: of an output pixel's (x, y, 1), its source (x', y')."""
    one, zero = np.float32(1), np.float32(0)
    matrix = np.array([[one, zero, zero], [zero, one, zero]])
    if name == "Rotate":
        radians = argument * np.float32(np.pi / 180)
        cos, sin = np.cos(radians), np.sin(radians)
        w, h = np.float32(width - 1), np.float32(height - 1)
        x = (w - (cos * w - sin * h)) / np.float32(2)
        y = (h - (sin * w + cos * h)) / np.float32(2)
        return np.array([[cos, -sin, x], [sin, cos, y]])
    places = {
        "ShearX": (0, 1),
        "ShearY": (1, 0),
        "TranslateX": (0, 2),
        "TranslateY": (1, 2),
    }
    if name in places:
        matrix[places[name]] = argument
    return matrix


def _table(name: str, argument: np.float32) -> np.ndarray:
    """`[256]` float32: the map of levels that an operation is, or the product in it."""
    level = np.arange(256)
    if name in ("Brightness", "Contrast"):
        return VALUES * argument
    if name == "Posterize":
        level = level & (256 - (1 << (8 - int(argument))))
    elif name == "Invert":
        level = 255 - level
    elif name in ("Solarize", "PillowSolarize"):
        # The official threshold of 256 overflows to 0, see host_operations.solarize.
        threshold = int(argument) % 256 if name == "Solarize" else int(argument)
        level = np.where(level >= threshold, 255 - level, level)
    elif name == "SolarizeAdd":
        level = np.where(level < 128, np.minimum(level + int(argument), 255), level)
    return level.astype(np.float32)


@functools.lru_cache
def build_parameters(rows: tuple[Row, ...], height: int, width: int) -> Parameters:
    """What the rows do to images of a size.

    Args:
      rows: operations and arguments.
      height, width: of the images, in pixels.
    """
    x, y = (np.arange(size, dtype=np.float32) for size in (width, height))
    per_row = []
    for name, value in rows:
        argument = np.float32(value)
        matrices = np.stack(
            [_matrix(name, sign * argument, height, width) for sign in (1, -1)]
        )
        rest: Array = np.float32(1) - argument
        weights: Array = np.zeros(3, np.float32)
        own: Array = np.float32(1)
        if name == "Color":
            rest = np.float32(1) - _in_steps(argument)
            weights = _in_steps(rest * np.array(LUMA, np.float32))
            own = np.float32(1) - weights.sum()
        elif name == "Sharpness":
            own = _in_steps(argument)
        per_row.append(
            Parameters(
                kind=np.int32(KINDS.get(name, 0)),
                across=matrices[..., 0, None] * x,
                down=matrices[..., 1, None] * y,
                shift=matrices[..., 2],
                half=np.int32(argument if name == "Cutout" else 0),
                product=_table(name, argument),
                share=VALUES * rest,
                weights=weights,
                own=own,
            )
        )
    return Parameters(*(np.stack(values) for values in zip(*per_row, strict=True)))


# Row d: 0..255 scaled to a channel whose largest value is d above its smallest.
STRETCHED = VALUES * (np.float32(255) / np.maximum(VALUES, 1)[:, None])
STRETCHED[0] = VALUES


# --- operations ---


def apply_operation(
    image: jax.Array,
    parameters: Parameters,
    row: jax.Array,
    negative: jax.Array,
    place: jax.Array,
) -> jax.Array:
    """One drawn operation.

    Args:
      image: `[3, H, W]` int32 in 0..255; channels first takes less time on a CPU.
      parameters: of all rows.
      row, negative, place: see `Drawn`, without its axis.

    Returns:
      `[3, H, W]` int32.
    """
    kept = Parameters(*(jnp.asarray(values)[row] for values in parameters))
    image = _move(image, kept, negative.astype(jnp.int32), place)
    image = _map_levels(image, kept)
    return _blend(image, kept)


def _move(
    image: jax.Array, kept: Parameters, sign: jax.Array, place: jax.Array
) -> jax.Array:
    """The geometry and the cutout: `out[y, x] = in[row, column]`, or the filling."""
    _, height, width = image.shape
    across, down, shift = kept.across[sign], kept.down[sign], kept.shift[sign]
    x, y = (
        across[axis] + down[axis][:, None] + shift[axis] for axis in (0, 1)
    )  # each [H, W]
    column = jnp.floor(x + 0.5).astype(jnp.int32)
    row = jnp.floor(y + 0.5).astype(jnp.int32)
    inside = (x > -0.5) & (column < width) & (y > -0.5) & (row < height)
    centre = jnp.floor(place * jnp.array([height, width])).astype(jnp.int32)
    cut = [
        (jnp.arange(size) >= centre[axis] - kept.half)
        & (jnp.arange(size) < centre[axis] + kept.half)
        for axis, size in enumerate((height, width))
    ]
    inside &= ~(cut[0][:, None] & cut[1])
    # One pixel of filling follows the last pixel of the image.
    index = jnp.where(inside, row * width + column, height * width)
    pixels = jnp.pad(image.reshape(3, -1), ((0, 0), (0, 1)), constant_values=FILL)
    return pixels.at[:, index].get(mode="promise_in_bounds")


def _map_levels(image: jax.Array, kept: Parameters) -> jax.Array:
    """Sends each value through the table of its channel, `[3, 256]`."""
    count = image.shape[1] * image.shape[2]
    flat = image.reshape(3, -1)
    low, high = jnp.min(flat, axis=1), jnp.max(flat, axis=1)
    # Contrast turns about the mean luma. Whole numbers, split so that they stay small.
    sums = jnp.sum(flat, axis=1)
    per_mille = jnp.array(LUMA_PER_MILLE)
    rest = jnp.sum(per_mille * (sums % count))
    total = jnp.sum(per_mille * (sums // count)) + rest // count
    luma = (2 * total + 1000 + 2 * (rest % count) // count) // 2000
    added = jnp.where(kept.kind == KINDS["Contrast"], kept.share[luma], 0.0)
    table = jnp.broadcast_to(_truncate(kept.product + added), (3, 256))
    # Autocontrast: x s - low s, of which both products are looked up.
    stretched = jnp.asarray(STRETCHED)[high - low]
    least = jnp.take_along_axis(stretched, low[:, None], axis=1)
    stretched -= jnp.where((high > low)[:, None], least, 0.0)
    table = jnp.where(kept.kind == KINDS["AutoContrast"], _truncate(stretched), table)
    # Equalize: see host_operations.equalize. The division comes last, and others divide
    # by 1, because a compiler repeats what is cheap for each pixel that looks it up.
    counts = jnp.zeros((3, 256), jnp.int32).at[jnp.arange(3)[:, None], flat].add(1)
    last = jnp.take_along_axis(counts, high[:, None], axis=1)
    step = (count - last) // 255
    equalizes = (kept.kind == KINDS["Equalize"]) & (step > 0)
    divisor = jnp.where(equalizes, step, 1)
    rounded = jnp.minimum(_sums_before(counts) + step // 2, 255 * divisor)
    table = jnp.where(equalizes, rounded, table) // divisor
    mapped = jnp.take_along_axis(table, flat, axis=1, mode="promise_in_bounds")
    return mapped.reshape(image.shape)


def _sums_before(counts: jax.Array) -> jax.Array:
    """`[3, 256]`: the sum of all counts before each."""
    # Sums over 16 and then over 16 values cost less than sums over 256.
    blocks = counts.reshape(3, 16, 16)
    whole = jnp.sum(blocks, axis=2)
    before = (jnp.cumsum(whole, axis=1) - whole)[:, :, None]
    return (jnp.cumsum(blocks, axis=2) - blocks + before).reshape(3, 256)


def _blend(image: jax.Array, kept: Parameters) -> jax.Array:
    """Color and sharpness: all sums are exact, see operations.FACTOR_STEPS."""
    x = image.astype(jnp.float32)
    red, green, blue = kept.weights
    luma = red * x[0] + green * x[1] + blue * x[2]
    colored = _truncate(luma + kept.own * x + 2.0**-10)
    blended = jnp.where(kept.kind == KINDS["Color"], colored, image)
    if min(image.shape[1:]) < 3:  # the filter fits nowhere
        return blended
    columns = image[:, :-2] + image[:, 1:-1] + image[:, 2:]
    box = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:]
    inner = image[:, 1:-1, 1:-1]
    smooth = (2 * (box + 4 * inner) + 13) // 26  # to the nearest of thirteenths
    sharp = smooth + kept.own * (inner - smooth).astype(jnp.float32)
    sharp = image.at[:, 1:-1, 1:-1].set(_truncate(sharp))
    return jnp.where(kept.kind == KINDS["Sharpness"], sharp, blended)


def _truncate(values: Array) -> jax.Array:
    return jnp.clip(values, 0.0, 255.0).astype(jnp.int32)


# --- policies ---


def _argument(rule: Rule, level: float) -> float:
    return float(np.float32(rule(np.array(level, np.float32))))


@functools.lru_cache
def policy_rows(policy: str, magnitude: float = 10.0) -> tuple[Row, ...]:
    """The operations that a policy can draw, with their arguments; the identity first.

    Args:
      policy: a name in `views.POLICIES` other than "none".
      magnitude: the level of RandAugment.
    """
    if policy == "auto_augment":
        rules = official_rules(
            translate=AUTO_AUGMENT_TRANSLATE, cutout=AUTO_AUGMENT_CUTOUT
        )
        rows = [(n, _argument(rules[n], v)) for pair in POLICY_V0 for n, _, v in pair]
    elif policy == "rand_augment":
        rules = official_rules(
            translate=RAND_AUGMENT_TRANSLATE, cutout=RAND_AUGMENT_CUTOUT
        )
        rows = [(name, _argument(rules[name], magnitude)) for name in NAMES]
    else:
        rows = [
            (name, _argument(rule, level))
            for name, rule in WIDE_RULES.items()
            for level in range(WIDE_LEVELS)
        ]
    return (IDENTITY, *rows)


def draw(key: jax.Array, augmentation: Augmentation) -> Drawn:
    """Draws a view's operations, as the host's policies do.

    AutoAugment: one of 25 pairs, each of whose operations has its own probability.
    RandAugment: `layers` times one of 16 operations and the identity. TrivialAugment: one
    of 13 operations and the identity, at one of 31 levels.

    Args:
      key: PRNG key.
      augmentation: with a policy.
    """
    row_key, other_key = jax.random.split(key)
    if augmentation.policy == "auto_augment":
        drawn = jax.random.uniform(row_key, (3,))
        pair = jnp.floor(drawn[0] * len(POLICY_V0)).astype(jnp.int32)
        chances = np.array([[p for _, p, _ in two] for two in POLICY_V0], np.float32)
        runs = drawn[1:] < jnp.asarray(chances)[pair]
        row = jnp.where(runs, 1 + 2 * pair + jnp.arange(2), 0)
    elif augmentation.policy == "rand_augment":
        drawn = jax.random.uniform(row_key, (augmentation.layers,))
        row = jnp.floor(drawn * (len(NAMES) + 1)).astype(jnp.int32)
    else:
        drawn = jax.random.uniform(row_key, (2,))
        number = jnp.floor(drawn[0] * (len(WIDE_RULES) + 1)).astype(jnp.int32)
        level = jnp.floor(drawn[1] * WIDE_LEVELS).astype(jnp.int32)
        row = jnp.where(number > 0, 1 + (number - 1) * WIDE_LEVELS + level, 0)[None]
    others = jax.random.uniform(other_key, (len(row), 3))
    return Drawn(row, others[:, 0] < 0.5, others[:, 1:])


def apply_policy(
    key: jax.Array, image: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """Sends a view through the policy of its augmentation.

    Args:
      key: PRNG key.
      image: `[H, W, 3]`, whole numbers in 0..255 of any type.
      augmentation: with a policy.

    Returns:
      `[H, W, 3]` int32.
    """
    height, width, _ = image.shape
    rows = policy_rows(augmentation.policy, augmentation.magnitude)
    parameters = build_parameters(rows, height, width)
    image = jnp.moveaxis(image, -1, 0).astype(jnp.int32)
    drawn = draw(key, augmentation)
    for number in range(len(drawn.row)):
        image = apply_operation(image, parameters, *(part[number] for part in drawn))
    return jnp.moveaxis(image, 0, -1)
