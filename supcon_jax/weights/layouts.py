"""The names that an encoder's arrays have in PyTorch, and back.

ResNets have torchvision's and timm's names, Wide ResNets those of WideResNet-pytorch,
Vision Transformers timm's. The names say nothing of padding and shortcuts: with
`convention="torchvision"` a ResNet computes what PyTorch's does.

Source: github.com/pytorch/vision, models/resnet.py; github.com/huggingface/
pytorch-image-models, models/vision_transformer.py; github.com/xternalz/WideResNet-pytorch,
wideresnet.py; github.com/HobbitLong/SupContrast, networks/resnet_big.py (a shortcut is
`shortcut` there).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from supcon_jax.models import ENCODERS, STEMS, create_encoder
from supcon_jax.models.convolution import CONVENTIONS
from supcon_jax.models.vit import resize_positions

PyTree = Any
Arrays = Mapping[str, np.ndarray]
# Tensors that a refusal names.
SHOWN = 3


class Layout(NamedTuple):
    """How a family of encoders is named elsewhere.

    Attributes:
      layers: our name of a layer, in a block or outside -> theirs.
      block: theirs of a block, with `stage` from 1 and `index` from 0.
      first: a tensor that every such encoder has, by which a prefix is found.
      classifier: theirs of the classifier.
    """

    layers: dict[str, str]
    block: str
    first: str
    classifier: str


_NUMBERED = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {
    f"batch_norm{i}": f"bn{i}" for i in (1, 2, 3)
}
LAYOUTS = {
    "resnet": Layout(
        {
            "conv_stem": "conv1",
            "batch_norm_stem": "bn1",
            "conv_shortcut": "downsample.0",
            "batch_norm_shortcut": "downsample.1",
            **_NUMBERED,
        },
        block="layer{stage}.{index}",
        first="conv1.weight",
        classifier="fc",
    ),
    "wrn": Layout(
        {
            "conv_stem": "conv1",
            "conv_shortcut": "convShortcut",
            "batch_norm_out": "bn1",
            **_NUMBERED,
        },
        block="block{stage}.layer.{index}",
        first="conv1.weight",
        classifier="fc",
    ),
    "vit": Layout(
        {
            "conv_stem": "patch_embed.proj",
            "token_stem": "cls_token",
            "positions_stem": "pos_embed",
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
            "norm1": "norm1",
            "norm2": "norm2",
            # Of the mean of the tokens it has another name there.
            "norm_out": "norm",
        },
        block="blocks.{stage0}",
        first="patch_embed.proj.weight",
        classifier="head",
    ),
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def layout_of(encoder_name: str) -> Layout:
    """How an encoder's arrays are named elsewhere.

    Raises:
      ValueError: it is none of the families that have names elsewhere.
    """
    for family, layout in LAYOUTS.items():
        if encoder_name.startswith(family):
            return layout
    raise ValueError(
        f"the arrays of {encoder_name} have no names in PyTorch; allowed: "
        f"{', '.join(f'{family}*' for family in LAYOUTS)} (--config.encoder.name)"
    )


def to_state_dict(
    encoder_name: str,
    params: PyTree,
    batch_stats: PyTree,
    *,
    classifier: PyTree | None = None,
) -> dict[str, np.ndarray]:
    """An encoder's arrays under their names in PyTorch, and in its order of axes.

    Args:
      encoder_name: a key of `ENCODERS`.
      params, batch_stats: of the encoder.
      classifier: `{"kernel": [D, C], "bias": [C]}` on its embedding.

    Raises:
      ValueError: its family has no such names.
    """
    layout = layout_of(encoder_name)
    flat = _flatten({"params": params, "batch_stats": batch_stats})
    named = {
        name: _to_theirs(np.asarray(flat[path]))
        for path, name in _names(layout, flat).items()
    }
    for leaf, array in (classifier or {}).items():
        named[f"{layout.classifier}.{_LEAVES[leaf]}"] = _to_theirs(np.asarray(array))
    return named


def from_state_dict(
    encoder_name: str, state_dict: Arrays, shapes: PyTree
) -> tuple[PyTree, PyTree]:
    """An encoder's parameters and batch statistics from PyTorch's names.

    Names may have anything before them, `module.` or `encoder.`; what has another
    prefix (a head) and the classifier are left out. The positions of a Vision Transformer
    are resized to the encoder's images.

    Args:
      encoder_name: a key of `ENCODERS`.
      state_dict: arrays by name.
      shapes: `{"params": ..., "batch_stats": ...}` of the encoder, as `jax.eval_shape` of
        its `init` gives them.

    Returns:
      `(params, batch_stats)`, float32.

    Raises:
      ValueError: in one line: tensors that differ, with both shapes, and the encoder that
        has the most of them.

    Example:
      >>> encoder = create_encoder("resnet18", width=0.1)
      >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> init = functools.partial(encoder.init, train=False)
      >>> shapes = jax.eval_shape(init, jax.random.key(0), images)
      >>> zeros = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
      >>> named = to_state_dict("resnet18", **zeros)
      >>> params, batch_stats = from_state_dict("resnet18", named, shapes)
      >>> params["conv_stem"]["kernel"].shape
      (7, 7, 3, 6)
    """
    layout = layout_of(encoder_name)
    expected = _flatten(shapes)
    names = _names(layout, expected)
    found = _without_prefix(state_dict, layout)
    if layout is LAYOUTS["vit"]:
        found = _with_positions(found, expected["params", "positions_stem"].shape)
    theirs = {name: np.shape(array) for name, array in found.items()}
    ours = {name: _theirs_shape(expected[path].shape) for path, name in names.items()}
    if theirs != ours:
        raise ValueError(_difference(encoder_name, theirs, ours, state_dict))
    arrays = {path: _to_ours(found[name]) for path, name in names.items()}
    tree = traverse_util.unflatten_dict(arrays)
    return tree["params"], tree.get("batch_stats", {})


def _flatten(tree: PyTree) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree)


def _names(
    layout: Layout, paths: Mapping[tuple[str, ...], Any]
) -> dict[tuple[str, ...], str]:
    """Paths in our tree, collection first -> the names there."""
    mean_of_tokens = ("params", "token_stem") not in paths
    return {path: _name(layout, path[1:], mean_of_tokens) for path in paths}


def _name(layout: Layout, path: tuple[str, ...], mean_of_tokens: bool) -> str:
    if path[0] == "norm_out" and mean_of_tokens:
        return f"fc_norm.{_LEAVES[path[1]]}"
    parts = []
    if block := re.fullmatch(r"stage(\d+)_block(\d*)", path[0]):
        stage, index = int(block[1]), int(block[2] or 1) - 1
        parts = [layout.block.format(stage=stage, stage0=stage - 1, index=index)]
        path = path[1:]
    parts += [layout.layers[path[0]], *(_LEAVES[leaf] for leaf in path[1:])]
    return ".".join(parts)


def _to_theirs(array: np.ndarray) -> np.ndarray:
    """Kernels `[h, w, C, D]` become `[D, C, h, w]`, matrices `[C, D]` become `[D, C]`."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(axes) if axes else array)


def _to_ours(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float32)
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return array.transpose(axes) if axes else array


def _theirs_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else _reversed_matrix(shape)


def _reversed_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if len(shape) == 2 else shape


def _without_prefix(state_dict: Arrays, layout: Layout) -> dict[str, np.ndarray]:
    """The encoder's tensors, by their names without what stands before all of them."""
    # Of two encoders, as those of MoCo, the first, which is the trained one.
    firsts = [
        name
        for name in state_dict
        if name == layout.first or name.endswith(f".{layout.first}")
    ]
    # Blocks have a conv1 too; the shortest name is that of the stem.
    first = min(firsts, key=lambda name: name.count("."), default=layout.first)
    prefix = first.removesuffix(layout.first)
    found = {}
    for name, array in state_dict.items():
        short = name.removeprefix(prefix).replace(".shortcut.", ".downsample.")
        if not name.startswith(prefix) or short.endswith(".num_batches_tracked"):
            continue
        if short.partition(".")[0] not in ("fc", "head"):
            found[short] = array
    return found


def _with_positions(found: Arrays, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same with positions for as many patches as the encoder has."""
    if np.ndim(found.get("pos_embed", 0.0)) != len(shape):
        return dict(found)  # none, which a comparison of all tensors tells
    positions = jnp.asarray(found["pos_embed"], jnp.float32)
    return {**found, "pos_embed": np.asarray(resize_positions(positions, shape))}


def _difference(
    encoder_name: str,
    theirs: Mapping[str, tuple[int, ...]],
    ours: Mapping[str, tuple[int, ...]],
    state_dict: Arrays,
) -> str:
    """One line: tensors that differ, and which encoder is nearest."""
    differing = [
        name
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    told = "; ".join(
        f"{name} {theirs.get(name, 'none')}, {encoder_name}'s {ours.get(name, 'none')}"
        for name in differing[:SHOWN]
    )
    more = f", and {len(differing) - SHOWN} more" if differing[SHOWN:] else ""
    return f"its tensors are not those of this encoder: {told}{more}; {_nearest(state_dict)}"


def _nearest(state_dict: Arrays) -> str:
    """The encoder that has the most tensors in common with a state dict, and how many."""
    best, flags, missing = (0.0, 0.0), "", 0
    for name in ENCODERS:
        if not name.startswith(tuple(LAYOUTS)):
            continue
        layout = layout_of(name)
        found = _without_prefix(state_dict, layout)
        if not any(key.startswith(layout.block.partition("{")[0]) for key in found):
            continue
        options = _visible_options(layout, found)
        shapes = _flatten(_shapes(name, **options))
        # Positions are resized.
        expected = {
            (theirs, _theirs_shape(shapes[path].shape))
            for path, theirs in _names(layout, shapes).items()
            if theirs != "pos_embed"
        }
        have = {(n, np.shape(array)) for n, array in found.items() if n != "pos_embed"}
        differing = {n for n, _ in expected ^ have}
        every = {n for n, _ in expected | have}
        common = {n for n, _ in expected} & {n for n, _ in have}
        # By names alone where all shapes differ, as those of another width do.
        likeness = 1 - len(differing) / len(every), len(common) / len(every)
        if likeness > best:
            best, missing = likeness, len(differing)
            flags = " ".join(
                f"--config.encoder.{key}={value}"
                for key, value in {"name": name, **options}.items()
            )
    if not flags:
        names = ", ".join(list(state_dict)[:SHOWN])
        return f"they are no encoder's that is known here ({names}, ...)"
    if missing:
        return f"nearest, with {missing} tensors that differ: {flags}"
    return f"they are those of {flags}"


def _visible_options(layout: Layout, found: Arrays) -> dict[str, Any]:
    """What tensors show of an encoder beside its name."""
    if layout is LAYOUTS["vit"]:
        return {"class_token": "cls_token" in found}
    small = layout.first in found and np.shape(found[layout.first])[-1] <= 3
    options: dict[str, Any] = {"stem": STEMS[1] if small else STEMS[0]}
    if layout is LAYOUTS["resnet"]:
        basic = "layer1.0.conv3.weight" not in found
        projects = basic and "layer1.0.downsample.0.weight" in found
        options["convention"] = CONVENTIONS[0] if projects else CONVENTIONS[1]
    return options


@functools.lru_cache
def _shapes(name: str, *, stem: str = "imagenet", **options: Any) -> PyTree:
    encoder = create_encoder(name, stem=stem).clone(**options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(encoder.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)
