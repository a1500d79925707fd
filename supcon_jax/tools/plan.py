"""What a run needs of a slice of accelerators that is not here, before it is rented.

    python -m supcon_jax.tools.plan --config=configs/supcon_r50.py --topology=v5e:16x16 \\
        --config.batch_size=8192
    python -m supcon_jax.tools.plan --config=configs/supcon_r50.py --topology=h100:4x8 --json

Compiles the real train step ahead of time with the compiler of that hardware, which needs
no such hardware: libtpu for TPUs (`pip install "jax[tpu]"`), CUDA's libraries for GPUs
(`pip install "jax[cuda13]"`). Prints memory, operations, traffic, collectives, the least
time of a step, length and size of the run, what the input must deliver, and a verdict.
Where the data are at hand (data.dir, or embedded), it also measures how fast this host
makes batches; else give --host_rate, from the `input:` line of any run on such a host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from supcon_jax.cli import one_line_errors
from supcon_jax.config.loading import load_config
from supcon_jax.logs import format_duration
from supcon_jax.planning.forecast import plan_run
from supcon_jax.planning.topologies import find_topology
from supcon_jax.tools.arguments import create_parser, parse


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, compiles and prints the plan."""
    parser = create_parser(__doc__.splitlines()[0])
    parser.add_argument("--topology", required=True, help="v5e:16x16, v4-128, h100:4x8")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--host_rate",
        type=float,
        help="images/s of one host, from the `input:` line of a run; measured here where "
        "the data are",
    )
    parser.add_argument(
        "--host_cores", type=int, help="of the host of --host_rate; those of the slice"
    )
    options, changes = parse(parser, arguments)
    with one_line_errors():
        for name, value in (("rate", options.host_rate), ("cores", options.host_cores)):
            if value is not None and value <= 0:
                raise ValueError(f"--host_{name}={value} must be above 0")
        topology = find_topology(options.topology)
        config = load_config(options.config, changes)
        found = plan_run(
            config,
            topology,
            host_rate=options.host_rate,
            host_cores=options.host_cores,
        )
        found = {"config": options.config, "changes": changes} | found
        print(json.dumps(found, indent=2) if options.json else as_text(found))


def as_text(found: dict[str, Any]) -> str:
    """The plan for people."""
    where, memory, step = found["topology"], found["memory"], found["step"]
    run, given = found["run"], found["input"]
    parts = found["microbatch_size"]
    lines = [
        f"{found['config']} on {where['name']}: {where['devices']} x {where['device']}, "
        f"{_count(where['hosts'], 'host')}; compiled in "
        f"{format_duration(found['compile_seconds'])}",
        f"step         {found['batch_size']:,} images x {found['views']} views, "
        f"{found['batch_size'] / where['devices']:g} images a device"
        + (f", {parts:,} at a time" if parts else ""),
    ]
    if memory["needed"]:
        lines.append(
            f"memory       {_bytes(memory['needed'])} a device of "
            f"{_bytes(memory['of_device'])}: {_bytes(memory['state_and_batch'])} for state and "
            f"batch, {_bytes(memory['working'])} while it runs"
        )
    lines.append(
        f"operations   {found['flops'] / 1e12:.3g} TFLOP a device: "
        f"{_ms(step['compute'])} at its peak"
    )
    if found["traffic"] is not None:
        lines += [
            f"traffic      {_bytes(found['traffic'])} of device memory: "
            f"{_ms(step['memory'])}",
            *_collective_lines(found),
            f"step time    at least {_ms(step['seconds'])}, bound by {step['bound']}: "
            f"{step['images_per_s']:,.0f} images/s",
            f"run          {run['steps']:,} steps, {run['epochs']:.4g} epochs, "
            f"{run['images']:,} images: at least "
            f"{format_duration(3600 * run['hours'])}",
            f"input        {given['images_per_s']:,.0f} images/s"
            + (
                f", each as {found['views']} views,"
                if given["host_makes_views"]
                else ""
            )
            + f" from each host, which has {where['host_cores']} cores; "
            + _measured(given),
        ]
        if given["bytes_per_s"]:
            total = given["bytes_per_s"] * where["hosts"]
            lines.append(
                f"storage      {given['bytes_per_s'] / 1e6:,.0f} MB/s to each host, "
                f"{total / 1e9:.3g} GB/s from the bucket, at "
                f"{given['image_bytes'] / 1e3:.0f} kB an image"
            )
    lines += [f"note: {note}" for note in found["notes"]]
    lines += [f"verdict: {verdict}" for verdict in found["verdict"]]
    return "\n".join(lines)


def _collective_lines(found: dict[str, Any]) -> Iterator[str]:
    groups, step = found["collectives"], found["step"]
    count = sum(one["times"] for one in groups)
    if not count:
        yield "collectives  none"
        return
    aside = sum(one["times"] for one in groups if one["asynchronous"])
    yield (
        f"collectives  {count} a step, {aside} of them asynchronous: "
        f"{_ms(step['collectives_blocking'])} in which nothing else runs"
    )
    for one in sorted(groups, key=lambda one: -one["bytes"]):
        how = ", asynchronous" if one["asynchronous"] else ""
        yield (
            f"  {one['times']:>4} x {one['kind']} {one['dtypes']} over "
            f"{one['devices']} devices, together {_bytes(one['bytes'])}{how}"
        )


def _measured(given: dict[str, Any]) -> str:
    if given["measured_images_per_s"] is None:
        return "no host was measured"
    rate, cores = given["measured_images_per_s"], given["measured_cores"]
    return (
        f"a host of {_count(cores, 'core')} was measured to make {rate:,.0f}, so it "
        f"takes {given['cores']:,.0f} cores"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


if __name__ == "__main__":
    main()
