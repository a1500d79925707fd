"""Time, memory and accuracy of the loss against other implementations.

    python -m benchmarks.loss                       # the whole table, about 20 minutes
    python -m benchmarks.loss --sizes 128,256,512,1024,2048 --no-memory
    python -m benchmarks.loss --accuracy            # gradient errors, half a minute
    python -m benchmarks.loss --options             # what the loss's own options cost

Forward and backward of the same batch, D = 128, T = 0.07, 100 classes, two views an
image. Each size has one process, in which the implementations take turns, in reverse
order every second round; each has an untimed call first and is then called for at least
20 ms. A ratio is the median over the rounds, so that a busy moment of the machine hits
all alike; CPU time hardly feels what else runs there. Peak memory is measured in a
process of its own for each, above what the process held with its libraries and inputs
loaded. PyTorch (the formula of the paper, eager and through torch.compile) and
pytorch-metric-learning are optional; what is missing is named.

The dense formulas in JAX, all under jit: "masks", as one writes it from the paper, with
logsumexp; "every pair's log", the order of operations of the authors' PyTorch code;
"lean", with the largest possible logit as the shift, one exponential and no logsumexp;
"class sums", lean without a mask for the positives, which loses digits when classes
collapse (--accuracy).
"""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

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
CPU_ROUNDS = {
    128: 25,
    256: 25,
    512: 25,
    1024: 15,
    2048: 15,
    4096: 9,
    8192: 5,
    16384: 3,
    32768: 2,
    65536: 1,
}
SECONDS_A_TURN = 0.02


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


def measure_time(names, size, rounds):
    """Child: `{name: {"loss", "wall": [s], "cpu": [s]}}`, taking turns."""
    result, steps, calls = {}, {}, {}
    for name in names:
        print(f"  N={size}: warming up {name}", file=sys.stderr, flush=True)
        try:
            steps[name] = runner(name, size)
            loss = steps[name]()
        except Exception as error:  # A peer that cannot run must not end the table.
            steps.pop(name, None)
            text = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            result[name] = {"error": text}
            continue
        start = time.perf_counter()
        steps[name]()
        calls[name] = 1 + int(SECONDS_A_TURN / (time.perf_counter() - start))
        result[name] = {"loss": loss, "wall": [], "cpu": []}
    for turn in range(rounds):
        print(f"  N={size}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            step, count = steps[name], calls[name]
            step()  # Nobody pays for the caches and threads that another left behind.
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                step()
            result[name]["wall"].append((time.perf_counter() - wall) / count)
            result[name]["cpu"].append((time.process_time() - cpu) / count)
    return result


def measure_memory(name, size):
    """Child: MiB above what the process held before, on the GPU if there is one."""
    device_peak = _device_peak(name)
    small = runner(name, 256)
    small()  # Libraries, thread pools and the compiler are not the loss's memory.
    step = runner(name, size)
    before = _resident()
    if device_peak is not None:
        before = device_peak()
    step()
    after = _resident() if device_peak is None else device_peak()
    return (after - before) / 2**20


def _resident():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device_peak(name):
    if name.startswith("supcon") or "JAX" in name:
        import jax

        if jax.default_backend() == "cpu":
            return None
        return lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated if torch.cuda.is_available() else None


def child(task, **arguments):
    """Run a measurement in a fresh process; its result, or an error."""
    environment = os.environ | {
        # Threads that spin while they wait take the cores from the next in turn.
        "OMP_WAIT_POLICY": "PASSIVE",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "benchmarks.loss", "--child", task]
    done = subprocess.run(
        [*command, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": f"the process ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(size, times, memory):
    """Table rows of one size: ratios are peer / supcon_loss, round by round."""
    ours = times.get(OURS, {})
    for name, entry in times.items():
        if "error" in entry:
            yield f"| {size} | {name} | {entry['error']} | | | | |"
            continue
        ratios = [
            statistics.median(a / b for a, b in zip(entry[k], ours[k], strict=True))
            if k in ours
            else float("nan")
            for k in ("wall", "cpu")
        ]
        extra = memory.get(name)
        extra = f"{extra:.0f}" if isinstance(extra, float) else "-"
        yield (
            f"| {size} | {name} | {1e3 * statistics.median(entry['wall']):.3g} | "
            f"{1e3 * statistics.median(entry['cpu']):.3g} | "
            f"{ratios[0]:.2f} | {ratios[1]:.2f} | {extra} |"
        )


def describe_machine():
    """One line: device, cores, versions, date."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, '/', d.device_kind)"
    device = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = []
    for package in ("jax", "torch", "pytorch_metric_learning"):
        if importlib.util.find_spec(package):
            from importlib.metadata import version

            versions.append(f"{package} {version(package)}")
    cores = len(os.sched_getaffinity(0))
    return (
        f"{device or 'no jax device'}, {cores} cores ({platform.machine()}), "
        f"{', '.join(versions)}, {datetime.date.today()}"
    )


def compare(sizes, rounds, names, with_memory, output):
    """The table of times and memory, printed and written."""
    machine = describe_machine()
    on_gpu = machine.startswith(("gpu", "cuda"))
    print(machine, flush=True)
    absent = missing()
    for name, package in absent.items():
        print(f"left out: {name} (needs the package {package})", flush=True)
    names = [n for n in names if n not in absent]
    if sizes is None:
        sizes = [*CPU_ROUNDS, 131072] if on_gpu else list(CPU_ROUNDS)
    lines = [
        f"{machine}. Forward and backward, D = {DIMENSION}, T = {TEMPERATURE}.",
        "",
        "| N | implementation | wall, ms | CPU, ms | wall / ours | CPU / ours | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        chosen = [n for n in names if size <= LARGEST.get(n, (16384, 65536))[on_gpu]]
        count = rounds or (10 if on_gpu else CPU_ROUNDS.get(size, 3))
        times = child("time", names=chosen, size=size, rounds=count)
        if "error" in times:
            lines.append(f"| {size} | all | {times['error']} | | | | |")
            print(lines[-1], flush=True)
            continue
        memory = {}
        for name in chosen if with_memory and size >= 4096 else ():
            print(f"  N={size}: memory of {name}", file=sys.stderr, flush=True)
            memory[name] = child("memory", name=name, size=size)
        for line in rows_of(size, times, memory):
            lines.append(line)
            print(line, flush=True)
    _write(lines, output)


def accuracy(output):
    """Gradient errors relative to dense float64, N = 2048."""
    import jax
    import jax.numpy as jnp

    from supcon_jax.losses import supcon_loss, tiles

    def one_pass(x, y):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    def ours(x, labels, temperature):
        return supcon_loss(x, labels, temperature=temperature)

    def inputs(spread):
        x, labels = batch(2048)
        if spread is not None:
            rng = np.random.default_rng(1)
            labels = labels % 10
            centers = rng.normal(size=(10, 1, DIMENSION))
            centers /= np.linalg.norm(centers, axis=-1, keepdims=True)
            noise = rng.normal(size=x.shape) / DIMENSION**0.5
            x = (centers[labels] + spread * noise).astype(np.float32)
        return x, labels

    full = tiles.matmul
    lines = [
        "| embeddings | T | dense float32 | supcon_loss | class sums | one bfloat16 pass |",
        "|---|---|---|---|---|---|",
    ]
    for spread in (None, 0.3, 0.03, 0.003):
        x, labels = inputs(spread)
        for temperature in (0.1, 0.07):
            with jax.enable_x64(True):
                exact = jax.grad(masks)(x.astype(np.float64), labels, temperature)
            errors = []
            for loss in (masks, ours, class_sums, "one pass"):
                tiles.matmul = one_pass if loss == "one pass" else full
                loss = ours if loss == "one pass" else loss
                got = jax.grad(loss)(x, labels, temperature)
                got, exact = np.asarray(got), np.asarray(exact)
                errors.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
            name = "ordinary" if spread is None else f"collapsed, spread {spread}"
            cells = " | ".join(f"{error:.1e}" for error in errors)
            lines.append(f"| {name} | {temperature} | {cells} |")
            print(lines[-1], flush=True)
    tiles.matmul = full
    _write(lines, output)


def _write(lines, output):
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if output:
        pathlib.Path(output).write_text(text)
        print(f"written to {output}")


def main():
    """Read the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", help="N, comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds at every size")
    parser.add_argument(
        "--only", help=f"implementations, comma-separated; of: {'; '.join(LARGEST)}"
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--accuracy", action="store_true", help="gradient errors")
    parser.add_argument("--options", action="store_true", help="of the loss itself")
    parser.add_argument("--output", help="file for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        task, arguments = flags.child
        measure = {"time": measure_time, "memory": measure_memory}[task]
        print(json.dumps(measure(**json.loads(arguments))))
    elif flags.accuracy:
        accuracy(flags.output)
    else:
        sizes = flags.sizes and [int(n) for n in flags.sizes.split(",")]
        names = [OURS, *OPTIONS] if flags.options else list(LARGEST)
        if flags.only:
            names = [n for n in (s.strip() for s in flags.only.split(";")) if n]
            names = [m for n in names for m in ([n] if n in LARGEST else n.split(","))]
        unknown = [n for n in names if n not in {*LARGEST, *OPTIONS}]
        if unknown:
            parser.error(f"--only knows {'; '.join(LARGEST)}; got {unknown[0]!r}")
        compare(sizes, flags.rounds, names, not flags.no_memory, flags.output)


if __name__ == "__main__":
    main()
