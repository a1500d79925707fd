"""Weights that a run starts from, or that its classifier stands on: `encoder.init_from`."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from supcon_jax import parallel, storage
from supcon_jax.checkpoint import restore_encoder
from supcon_jax.models.vit import resize_positions
from supcon_jax.run.plan import Plan, init_encoder
from supcon_jax.weights import WeightsFile, from_state_dict, read_weights

logger = logging.getLogger(__name__)
PyTree = Any
# Arrays that a refusal names.
SHOWN = 3


def load_weights(plan: Plan) -> PyTree:
    """The encoder's variables from `encoder.init_from`, on every device.

    None where the config names no weights: the encoder starts from the seed.

    Raises:
      ValueError: in one line: they cannot be read, are of another encoder, or mean another
        function than this config's encoder computes.
    """
    config, replicated = plan.config, parallel.replicated(plan.mesh)
    source, expected = config.encoder.init_from, encoder_shapes(plan)
    if not source:
        return None
    if storage.is_dir(storage.absolute(source)):
        variables = restore_encoder(
            source, average=config.encoder_average.use, sharding=replicated
        )
        return fitted(variables, expected, source=source)
    weights = read_weights(source)
    _check_convention(config, weights)
    try:
        params, batch_stats = from_state_dict(
            config.encoder.name, weights.arrays, expected
        )
    except ValueError as error:
        raise ValueError(f"cannot start from {source}: {error}") from None
    logger.info(
        "the encoder starts with %d arrays of %s; they are for pixels scaled as in their "
        "training, here by data.mean=%s, data.std=%s",
        len(jax.tree.leaves((params, batch_stats))),
        source,
        tuple(config.data.mean),
        tuple(config.data.std),
    )
    return jax.device_put({"params": params, "batch_stats": batch_stats}, replicated)


def _check_convention(config: ConfigDict, weights: WeightsFile) -> None:
    """Refuses a config in which the same arrays would be another function."""
    theirs, ours = weights.metadata.get("convention", "torchvision"), config.encoder
    # Where the shortcuts differ, so do the arrays.
    alike = ours.stem != "imagenet" or ours.name.startswith("vit")
    if theirs != ours.convention and not alike:
        raise ValueError(
            f"the weights in {ours.init_from} are for a max-pool that pads as "
            f"encoder.convention={theirs!r} says, got {ours.convention!r}; set "
            f"--config.encoder.convention={theirs}"
        )


def encoder_shapes(plan: Plan) -> PyTree:
    """Shapes and types of the encoder's variables."""
    return jax.eval_shape(functools.partial(init_encoder, plan))


def fitted(variables: PyTree, expected: PyTree, *, source: str) -> PyTree:
    """The encoder of a run, for this config's image size.

    Only the positions of a Vision Transformer depend on it: they are resized.

    Args:
      variables: of the other run.
      expected: shapes of this one's.
      source: the other run's workdir.

    Raises:
      ValueError: they are another encoder's arrays; naming them.
    """
    params, name = variables["params"], "positions_stem"
    if name in params and name in expected["params"]:
        resized = resize_positions(params[name], expected["params"][name].shape)
        placed = jax.device_put(resized, params[name].sharding)
        variables = {**variables, "params": {**params, name: placed}}
    theirs, ours = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (variables, expected)
    )
    differing = [
        name
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        told = [
            f"{name} {theirs.get(name, 'none')}, this config's {ours.get(name, 'none')}"
            for name in differing[:SHOWN]
        ]
        more = f", and {len(differing) - SHOWN} more" if differing[SHOWN:] else ""
        raise ValueError(
            f"the encoder of {source} has {'; '.join(told)}{more}; set "
            "--config.data.image_size or --config.encoder.* as there"
        )
    return variables
