"""Learning-rate schedules, the optimizers of the paper and AdamW, with their masks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "staircase", "piecewise")


def create_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
    cosine_end: float = 0.0,
    decay_rate: float = 0.97,
    decay_epochs: float = 0.5,
    boundaries_epochs: Sequence[float] = (),
) -> optax.Schedule:
    """Linear warm-up, then a decay whose clock starts at its end.

    With t the step, w the warm-up steps, u = t - w, s = warmup_start, e = cosine_end:

    - warm-up (t < w): `learning_rate * (s + (1 - s) t / w)`
    - "constant": `learning_rate`
    - "cosine": `learning_rate * (e + (1 - e) (1 + cos(pi u / (total_steps - w))) / 2)`
    - "staircase": `learning_rate * decay_rate ** floor(u / decay_steps)`
    - "piecewise": `learning_rate * decay_rate ** (number of boundaries passed)`

    Args:
      name: one of `SCHEDULES`.
      learning_rate: peak value.
      total_steps: length of the run in steps, where cosine ends.
      steps_per_epoch: may be fractional, examples / batch size.
      warmup_epochs: length of the warm-up in epochs.
      warmup_start: where the warm-up begins, a share of the peak.
      cosine_end: where "cosine" ends, a share of the peak.
      decay_rate: factor of "staircase" and "piecewise".
      decay_epochs: stair length of "staircase" in epochs.
      boundaries_epochs: boundaries of "piecewise", in epochs after the warm-up.

    Returns:
      A function of the step, usable inside `jax.jit`.

    Raises:
      ValueError: unknown name.

    Example:
      >>> schedule = create_schedule("cosine", learning_rate=1.0, total_steps=100,
      ...                            steps_per_epoch=10, warmup_epochs=1)
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 55, 100)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    Source: the paper's official code, `utils.py` (supcon, google-research).
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {name!r}; available: {', '.join(SCHEDULES)} "
            "(--config.optimizer.schedule)"
        )
    warmup_steps = warmup_epochs * steps_per_epoch
    # A run may end within its warm-up (a few steps to try a recipe).
    decay_steps = max(total_steps - warmup_steps, 1.0)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.maximum(step - warmup_steps, 0.0)
        if name == "cosine":
            progress = jnp.minimum(after / decay_steps, 1.0)
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            factor = cosine_end + (1.0 - cosine_end) * factor
        elif name == "staircase":
            # The floor of the quotient, told by a product, which is exact for whole steps:
            # a compiler multiplies by the reciprocal and may end just below the stair.
            length = decay_epochs * steps_per_epoch
            nearest = jnp.round(after / length)
            stairs = jnp.where(nearest * length <= after, nearest, nearest - 1)
            factor = decay_rate**stairs
        elif name == "piecewise":
            steps = jnp.asarray(boundaries_epochs, jnp.float32) * steps_per_epoch
            factor = decay_rate ** jnp.sum(after >= steps)
        else:
            factor = jnp.ones(())
        warmup = step / warmup_steps if warmup_steps > 0 else 1.0
        warmup = warmup_start + (1.0 - warmup_start) * warmup
        return learning_rate * jnp.where(step < warmup_steps, warmup, factor)

    return schedule


def path_mask(params: Any, exclude: Sequence[str]) -> Any:
    """A tree of booleans: False where a parameter's path matches a pattern.

    Args:
      params: a tree of parameters.
      exclude: regular expressions, searched in paths such as
        "encoder/stage1_block1/batch_norm1/scale".

    Returns:
      A tree of the same structure with Python booleans.
    """
    pattern = re.compile("|".join(f"(?:{part})" for part in exclude) or r"(?!)")

    def keep(path: tuple[Any, ...], _: Any) -> bool:
        return (
            pattern.search(jax.tree_util.keystr(path, simple=True, separator="/"))
            is None
        )

    return jax.tree_util.tree_map_with_path(keep, params)


class OptimizerOptions(NamedTuple):
    """Coefficients of the optimizers; each reads its own.

    Attributes:
      weight_decay: coefficient wd.
      momentum: coefficient of the velocity (not of AdamW).
      trust_coefficient: LARS's eta.
      rmsprop_decay: decay of the mean square.
      rmsprop_epsilon: added to the mean square.
      adam_b1, adam_b2: decays of AdamW's two means.
      adam_epsilon: added to the root of the mean square.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    rmsprop_decay: float = 0.9
    rmsprop_epsilon: float = 1e-3
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_epsilon: float = 1e-8


Mask = Callable[[Any], Any]  # parameters -> a tree of booleans, see `path_mask`


def _lars(
    learning_rate: optax.ScalarOrSchedule, mask: Mask, options: OptimizerOptions
) -> optax.GradientTransformation:
    return optax.lars(
        learning_rate,
        weight_decay=options.weight_decay,
        weight_decay_mask=mask,
        trust_coefficient=options.trust_coefficient,
        eps=0.0,
        trust_ratio_mask=mask,
        momentum=options.momentum,
    )


def _sgd(
    learning_rate: optax.ScalarOrSchedule,
    mask: Mask,
    options: OptimizerOptions,
    *,
    nesterov: bool,
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.sgd(learning_rate, options.momentum, nesterov=nesterov),
    )


def _rmsprop(
    learning_rate: optax.ScalarOrSchedule, mask: Mask, options: OptimizerOptions
) -> optax.GradientTransformation:
    rmsprop = optax.rmsprop(
        learning_rate,
        decay=options.rmsprop_decay,
        eps=options.rmsprop_epsilon,
        initial_scale=1.0,
        eps_in_sqrt=True,
        momentum=options.momentum,
    )
    return optax.chain(optax.add_decayed_weights(options.weight_decay, mask), rmsprop)


def _adamw(
    learning_rate: optax.ScalarOrSchedule, mask: Mask, options: OptimizerOptions
) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        options.adam_b1,
        options.adam_b2,
        options.adam_epsilon,
        weight_decay=options.weight_decay,
        mask=mask,
    )


# A new one is a function of the learning rate, the mask and the options, and an entry.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "lars": _lars,
    "momentum": functools.partial(_sgd, nesterov=False),
    "nesterov": functools.partial(_sgd, nesterov=True),
    "rmsprop": _rmsprop,
    "adamw": _adamw,
}


def create_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    exclude: Sequence[str] = ("batch_norm",),
    **options: float,
) -> optax.GradientTransformation:
    """An optimizer as the paper's official code has it.

    - "lars": `v = momentum v + lr r (g + wd w)`, `w -= v`, with the trust ratio
      `r = trust_coefficient |w| / |g + wd w|` (1 where a norm is zero).
    - "momentum", "nesterov": SGD with weight decay in the gradient (coupled L2).
    - "rmsprop": the slot starts at one and epsilon sits inside the root, as in
      TensorFlow 1; the learning rate is applied before the momentum.
    - "adamw": `w -= lr (m / (sqrt(v) + adam_epsilon) + wd w)` with the means m of the
      gradient and v of its square, both corrected for their start at zero.

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: a number or a schedule.
      exclude: regular expressions on parameter paths; what matches gets neither
        weight decay nor (LARS) a trust ratio.
      options: fields of `OptimizerOptions`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: unknown name.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = create_optimizer("lars", 3.0, exclude=())
      >>> params, gradients = jnp.array([1.0, 2.0]), jnp.array([0.1, 0.1])
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates).round(5)
      Array([0.99526, 1.99526], dtype=float32)

    Source: You et al., arXiv 1708.03888 (LARS); Loshchilov & Hutter, arXiv 1711.05101
    (AdamW); official code, `utils.py`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {name!r}; available: {', '.join(OPTIMIZERS)} "
            "(--config.optimizer.name)"
        )
    mask = functools.partial(path_mask, exclude=exclude)
    return OPTIMIZERS[name](learning_rate, mask, OptimizerOptions(**options))
