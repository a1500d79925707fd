"""Weights by a rule, so that PyTorch's outputs on them can be kept in a few numbers.

    python -m tests.torch_weights

writes those numbers anew, tests/testdata/weights.json, and the small files beside it; it
needs torch and timm (torchvision's ResNets are timm's, which a test shows).
"""

import json
import pathlib
import zlib

import numpy as np

TESTDATA = pathlib.Path(__file__).parent / "testdata"
SIDE = 64
# Ours, and timm's name with what it is made with.
MODELS = {
    "resnet18": ("resnet18", {}),
    "vit_tiny_patch16": ("vit_tiny_patch16_224", {"img_size": SIDE}),
}


def values(name, shape):
    """Of a tensor: what training might have left there, from its name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.normal(size=shape)
    if name.endswith("running_var"):
        drawn = 0.5 + np.abs(drawn)
    elif len(shape) == 1:
        drawn = 0.1 * drawn + name.endswith("weight")  # scales are near 1
    elif len(shape) != 3:  # not a token's or positions
        drawn = drawn / np.sqrt(np.prod(shape[1:]))
    return drawn.astype(np.float32)


def images(count=2, side=SIDE):
    """`[count, side, side, 3]`, as normalised photos are: smooth, of all colours."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y) for _ in range(6)]
    mixed = np.tensordot(rng.normal(size=(count, 3, 6)), waves, 1)
    return np.moveaxis(mixed, 1, -1).astype(np.float32)


def torch_outputs(model, images):
    """What a PyTorch model gives for images `[N, S, S, 3]` with `values` as its weights."""
    import torch

    state = {
        name: torch.from_numpy(np.asarray(values(name, tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))
    return outputs.numpy()


def main():
    import timm
    import torch

    found = {}
    for ours, (theirs, options) in MODELS.items():
        outputs = torch_outputs(
            timm.create_model(theirs, num_classes=0, **options), images()
        )
        found[ours] = np.round(outputs[:, ::16].astype(float), 7).tolist()
    (TESTDATA / "weights.json").write_text(json.dumps(found) + "\n")
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "module.matrix": base.reshape(4, 6).t()[1:],  # strided, from the middle
        "module.half": base[:3].half(),
        "module.brain": base[:3].bfloat16(),
        "module.count": torch.tensor(7),
    }
    checkpoint = {"epoch": 3, "state_dict": tensors, "best": torch.tensor(0.5)}
    for name, new in (("zip", True), ("row", False)):
        path = TESTDATA / f"weights_{name}.pth"
        torch.save(checkpoint, path, _use_new_zipfile_serialization=new)


if __name__ == "__main__":
    main()
