"""What benchmarks.loss compares: the loss, the formula written otherwise, PyTorch.

Each is a function without arguments, of one batch that all get, from `runner`.
"""

import importlib.util
import os

import numpy as np

DIMENSION, TEMPERATURE, CLASSES = 128, 0.07, 100
OURS = "supcon_loss"
# The largest N of each, on a CPU with 16 GB and on a GPU: the others hold N x N arrays.
LARGEST = {
    OURS: (65536, 131072),
    "supcon_loss + diagnostics": (16384, 131072),
    "dense JAX, masks": (16384, 65536),
    "dense JAX, every pair's log": (8192, 32768),
    "dense JAX, lean": (8192, 32768),
    "dense JAX, class sums": (8192, 32768),
    "dense PyTorch, eager": (16384, 65536),
    "dense PyTorch, torch.compile": (16384, 65536),
    "pytorch-metric-learning": (8192, 32768),
}
# Options of the loss that --options compares with it; rows of labels show 3 of 80 classes.
LABEL_CLASSES = 80
OPTIONS = {
    "supcon_loss, any": {"label_similarity": "any"},
    "supcon_loss, jaccard": {"label_similarity": "jaccard"},
    "supcon_loss, inner": {"label_similarity": "inner"},
    "supcon_loss, hard negatives": {"hard_negative_beta": 0.5},
}


def batch(num_views_total):
    """Unit vectors around class centres, `[N/2, 2, D]`, and labels `[N/2]`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, num_views_total // 2).astype(np.int32)
    x = rng.normal(size=(num_views_total // 2, 2, DIMENSION)).astype(np.float32)
    x += 0.5 * rng.normal(size=(CLASSES, 1, DIMENSION)).astype(np.float32)[labels]
    return x, labels


def rows_of_labels(labels):
    """`[N/2, LABEL_CLASSES]`: an image's class and two more."""
    rng = np.random.default_rng(1)
    rows = np.zeros((len(labels), LABEL_CLASSES), np.float32)
    for row, label in zip(rows, labels, strict=True):
        row[rng.choice(LABEL_CLASSES, 2, replace=False)] = 1
        row[label % LABEL_CLASSES] = 1
    return rows


def unit_rows(x, labels):
    """`[N, D]` unit vectors, `[N]` classes, `[N, N]` which pairs are of two views."""
    import jax.numpy as jnp

    z = x.reshape(-1, x.shape[-1])
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    return z, jnp.repeat(labels, x.shape[1]), ~jnp.eye(len(z), dtype=bool)


def masks(x, labels, temperature):
    """The formula as it stands, with the N x N matrix, in the precision of x."""
    import jax
    import jax.numpy as jnp

    z, group, other = unit_rows(x, labels)
    positive = (group[:, None] == group) & other
    logits = jnp.matmul(z, z.T, precision="highest") / temperature
    total = jax.nn.logsumexp(jnp.where(other, logits, -jnp.inf), axis=1)
    mean_positive = jnp.sum(jnp.where(positive, logits, 0), 1) / positive.sum(1)
    return jnp.mean(total - mean_positive)


def all_log_probabilities(x, labels, temperature):
    """The log-probability of every pair, then the mask: the authors' PyTorch code."""
    import jax
    import jax.numpy as jnp

    z, group, other = unit_rows(x, labels)
    positive = ((group[:, None] == group) & other).astype(z.dtype)
    logits = jnp.matmul(z, z.T, precision="highest") / temperature
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(jnp.exp(logits) * other, axis=1, keepdims=True)
    log_probability = logits - jnp.log(total)
    return -jnp.mean(jnp.sum(positive * log_probability, 1) / jnp.sum(positive, 1))


def lean(x, labels, temperature):
    """One exponential a pair, with the largest possible logit as the shift."""
    import jax.numpy as jnp

    z, group, other = unit_rows(x, labels)
    positive = (group[:, None] == group) & other
    z = z / temperature**0.5
    logits = jnp.matmul(z, z.T, precision="highest")
    total = jnp.sum(jnp.where(other, jnp.exp(logits - 1 / temperature), 0), axis=1)
    mean_positive = jnp.sum(jnp.where(positive, logits, 0), 1) / positive.sum(1)
    return jnp.mean(1 / temperature + jnp.log(total) - mean_positive)


def class_sums(x, labels, temperature):
    """Positives through the sum of their class: equal on paper."""
    import jax
    import jax.numpy as jnp

    z, group, other = unit_rows(x, labels)
    z = z / temperature**0.5
    sums = jax.ops.segment_sum(z, group, num_segments=CLASSES)[group]
    count = jax.ops.segment_sum(jnp.ones(len(z)), group, CLASSES)[group] - 1
    logits = jnp.matmul(z, z.T, precision="highest")
    total = jnp.sum(jnp.where(other, jnp.exp(logits - 1 / temperature), 0), axis=1)
    mean_positive = jnp.sum(z * (sums - z), axis=1) / count
    return jnp.mean(1 / temperature + jnp.log(total) - mean_positive)


DENSE = {
    "dense JAX, masks": masks,
    "dense JAX, every pair's log": all_log_probabilities,
    "dense JAX, lean": lean,
    "dense JAX, class sums": class_sums,
}


def torch_dense_loss(x, labels, temperature):
    """The same formula in PyTorch, written from the paper."""
    import torch

    z = torch.nn.functional.normalize(x.flatten(0, 1), dim=1)
    group = labels.repeat_interleave(x.shape[1])
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (group[:, None] == group[None, :]) & other
    logits = z @ z.T / temperature
    log_total = torch.logsumexp(logits.masked_fill(~other, -torch.inf), 1, True)
    log_probability = (logits - log_total) * positive
    return -(log_probability.sum(1) / positive.sum(1)).mean()


def jax_runner(name, size):
    """A function without arguments: one forward and backward, its loss."""
    import jax

    from supcon_jax.losses import supcon_loss

    def loss(x, labels):
        if name == OURS:
            return supcon_loss(x, labels, temperature=TEMPERATURE), 0.0
        if name.endswith("diagnostics"):
            return supcon_loss(
                x, labels, temperature=TEMPERATURE, with_diagnostics=True
            )
        if name in OPTIONS:
            return supcon_loss(x, labels, temperature=TEMPERATURE, **OPTIONS[name]), 0.0
        return DENSE[name](x, labels, TEMPERATURE), 0.0

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    x, labels = batch(size)
    if "label_similarity" in OPTIONS.get(name, {}):
        labels = rows_of_labels(labels)
    x, labels = map(jax.device_put, (x, labels))
    return lambda: float(jax.block_until_ready(step(x, labels))[0][0])


def torch_runner(name, size):
    """The same for the implementations in PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    x, labels = (torch.from_numpy(a).to(device) for a in batch(size))
    x.requires_grad_()
    if name == "pytorch-metric-learning":
        from pytorch_metric_learning.losses import SupConLoss

        peer = SupConLoss(temperature=TEMPERATURE)

        def loss(x, labels):
            return peer(x.flatten(0, 1), labels.repeat_interleave(2))

    else:

        def loss(x, labels):
            return torch_dense_loss(x, labels, TEMPERATURE)

        if name.endswith("torch.compile"):
            loss = torch.compile(loss, dynamic=False)

    def run():
        x.grad = None
        value = loss(x, labels)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.item()

    return run


def runner(name, size):
    """The step of an implementation at N = size."""
    is_jax = name.startswith("supcon") or "JAX" in name
    return (jax_runner if is_jax else torch_runner)(name, size)


def missing():
    """Implementations that are not installed, with the package that they need."""
    absent = {}
    for name in LARGEST:
        needs = "torch" if "PyTorch" in name or "pytorch" in name else "jax"
        needs = "pytorch_metric_learning" if name.startswith("pytorch") else needs
        if importlib.util.find_spec(needs) is None or (
            needs != "jax" and importlib.util.find_spec("torch") is None
        ):
            absent[name] = needs
    return absent
