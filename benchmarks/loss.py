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

from benchmarks.loss_implementations import (
    DIMENSION,
    LARGEST,
    OPTIONS,
    OURS,
    TEMPERATURE,
    batch,
    class_sums,
    masks,
    missing,
    runner,
)

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
