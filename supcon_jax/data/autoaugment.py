"""AutoAugment, RandAugment and TrivialAugment on the host, in TensorFlow.

Policies take one view `[H, W, 3]` uint8 and a stateless seed, and are functions of the two
alone; what they choose from is in host_operations.py. TensorFlow is imported at the top, so
nothing imports this module before host.py does. operations.py says what the policies are;
policies.py does the same in the jitted step, bit for bit.

Source: Cubuk et al., arXiv 1805.09501 and 1909.13719; Müller & Hutter, arXiv 2103.10158.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf

from supcon_jax.data.host_operations import FUNCTIONS, cutout
from supcon_jax.data.operations import (
    AUTO_AUGMENT_CUTOUT,
    AUTO_AUGMENT_TRANSLATE,
    NAMES,
    POLICY_V0,
    RAND_AUGMENT_CUTOUT,
    RAND_AUGMENT_TRANSLATE,
    WIDE_LEVELS,
    WIDE_RULES,
    Rule,
    official_rules,
)

# --- levels ---


def operate(
    name: str, rule: Rule, image: tf.Tensor, level: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
    """An operation at a level; the seed decides about its sign and place."""
    argument = rule(level, tf.floor)
    if name == "Cutout":
        return cutout(image, argument, seed)
    if rule.signed:
        negative = tf.random.stateless_uniform([], seed) < 0.5
        argument = tf.where(negative, -argument, argument)
    return FUNCTIONS[name](image, argument)


def _official(
    name: str,
    image: tf.Tensor,
    level: tf.Tensor,
    seed: tf.Tensor,
    translate: float,
    cutout_half: float,
) -> tf.Tensor:
    rule = official_rules(translate=translate, cutout=cutout_half)[name]
    return operate(name, rule, image, level, seed)


Operation = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, float, float], tf.Tensor]
# name -> (view, level 0..10, seed, translate_const, cutout_const) -> view
OPERATIONS: dict[str, Operation] = {
    name: functools.partial(_official, name) for name in NAMES
}


# --- policies ---


def _apply(
    image: tf.Tensor,
    operation: tf.Tensor,
    level: tf.Tensor,
    seed: tf.Tensor,
    *,
    names: tuple[str, ...],
    translate: float,
    cutout_half: float,
) -> tf.Tensor:
    """Operation number `operation` of `names`; `len(names)` is the identity."""
    # Each operation is built inside its branch, so that only the chosen one runs.
    branches = [
        functools.partial(OPERATIONS[name], image, level, seed, translate, cutout_half)
        for name in names
    ]
    chosen = tf.switch_case(operation, [*branches, lambda: image])
    return tf.ensure_shape(chosen, image.shape)


def auto_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One of 25 sub-policies, each of whose two operations has its own probability.

    Args:
      image: `[H, W, 3]` uint8.
      seed: `[2]` integers.
    """
    used = tuple(sorted({name for pair in POLICY_V0 for name, _, _ in pair}))
    number = tf.constant([[used.index(n) for n, _, _ in pair] for pair in POLICY_V0])
    probability = tf.constant([[p for _, p, _ in pair] for pair in POLICY_V0])
    level = tf.constant([[float(v) for _, _, v in pair] for pair in POLICY_V0])
    drawn = tf.random.stateless_uniform([3], tf.random.fold_in(seed, 0))
    pair = tf.cast(drawn[0] * len(POLICY_V0), tf.int32)
    for place in range(2):
        runs = drawn[1 + place] < probability[pair, place]
        image = _apply(
            image,
            tf.where(runs, number[pair, place], len(used)),
            level[pair, place],
            tf.random.fold_in(seed, 1 + place),
            names=used,
            translate=AUTO_AUGMENT_TRANSLATE,
            cutout_half=AUTO_AUGMENT_CUTOUT,
        )
    return image


def rand_augment(
    image: tf.Tensor, seed: tf.Tensor, *, layers: int = 2, magnitude: float = 10.0
) -> tf.Tensor:
    """`layers` times one of the 16 operations or the identity, drawn uniformly.

    Args:
      image: `[H, W, 3]` uint8.
      seed: `[2]` integers.
      layers: operations in a row.
      magnitude: level of all of them, 0..10.
    """
    drawn = tf.random.stateless_uniform([layers], tf.random.fold_in(seed, 0))
    for layer in range(layers):
        image = _apply(
            image,
            tf.cast(drawn[layer] * (len(NAMES) + 1), tf.int32),
            tf.constant(magnitude, tf.float32),
            tf.random.fold_in(seed, 1 + layer),
            names=NAMES,
            translate=RAND_AUGMENT_TRANSLATE,
            cutout_half=RAND_AUGMENT_CUTOUT,
        )
    return image


def trivial_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One of the identity and 13 operations at one of 31 levels, both drawn uniformly.

    Args:
      image: `[H, W, 3]` uint8.
      seed: `[2]` integers.
    """
    drawn = tf.random.stateless_uniform([2], tf.random.fold_in(seed, 0))
    level = tf.floor(drawn[1] * WIDE_LEVELS)
    sign_seed = tf.random.fold_in(seed, 1)
    branches = [
        functools.partial(operate, name, rule, image, level, sign_seed)
        for name, rule in WIDE_RULES.items()
    ]
    number = tf.cast(drawn[0] * (len(branches) + 1), tf.int32)
    chosen = tf.switch_case(number, [*branches, lambda: image])
    return tf.ensure_shape(chosen, image.shape)
