"""A plan for hardware that is not here: slices, collectives, roofline, verdicts."""

import json

import jax
import pytest

from supcon_jax import parallel
from supcon_jax.planning import forecast, topologies
from supcon_jax.planning.forecast import Compiled, Data, describe
from supcon_jax.planning.roofline import (
    LATENCY_S,
    Collective,
    by_kind,
    find_collectives,
    memory_traffic,
    step_time,
)
from supcon_jax.planning.topologies import CHIPS, SHAPES, Topology, find_topology
from supcon_jax.run.memory import StepMemory
from supcon_jax.run.plan import create_plan
from supcon_jax.tools import plan as tool
from supcon_jax.tools.plan import as_text
from tests.aot import compiled_for_tpu
from tests.runs import RESNET, pretrain_config

# --- slices ---


@pytest.mark.parametrize(
    "name, found, chips, hosts",
    [
        ("v5e:16x16", "v5e:16x16", 256, 64),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v5litepod-64", "v5e:8x8", 64, 16),
        ("v4-128", "v4:4x4x4", 64, 16),  # 128 cores
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("V6E:2x4", "v6e:2x4", 8, 2),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 16),
        ("h100:4x8", "h100:4x8", 32, 4),
        ("h100-32", "h100:4x8", 32, 4),
        ("a100:1x2", "a100:1x2", 2, 1),
    ],
)
def test_slices_by_name(name, found, chips, hosts):
    topology = find_topology(name)
    assert (topology.name, topology.num_chips, topology.num_hosts) == (
        found,
        chips,
        hosts,
    )


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:3x5", "v4-127", "v9:2x2", "h100:2x3", "h100:0x8", "h100-5"]
)
def test_slices_that_do_not_exist(name):
    with pytest.raises(ValueError, match=r"v5e:2x2 2x4 .*h100.*--topology") as refusal:
        find_topology(name)
    assert repr(name) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_listed_slice_is_found_by_both_names(kind):
    for topology in topologies.known_topologies(kind):
        cores = 2 if kind in ("v4", "v5p") else 1
        assert find_topology(topology.name) == topology
        assert find_topology(f"{kind}-{topology.num_chips * cores}") == topology


@pytest.mark.parametrize(
    "name, kind, devices, seconds",
    [
        ("h100:1x8", "all-reduce", 8, 2 * 7 / 8 * 9e7 / 450e9),
        # A group within one of several hosts, as of BatchNorm's statistics.
        ("h100:4x8", "all-reduce", 8, 2 * 7 / 8 * 9e7 / 450e9),
        ("h100:4x8", "all-gather", 2, 1 / 2 * 9e7 / 450e9),
        # Of all hosts: NVLink takes longer than an eighth of it on each network card.
        ("h100:4x8", "all-reduce", 32, 2 * 7 / 8 * 9e7 / 450e9),
        ("h100:32x8", "all-gather", 256, 31 / 32 * 9e7 / 8 / 50e9),
        ("a100:2x8", "reduce-scatter", 16, 7 / 8 * 9e7 / 300e9),
    ],
)
def test_gpus_of_one_host_use_their_own_links(name, kind, devices, seconds):
    """And all of its network between hosts, so that the time is a lower bound."""
    sent = Collective(kind, "f32", 90_000_000, devices)
    times = step_time(find_topology(name), flops=1, traffic=1, collectives=[sent])
    assert times.blocking == pytest.approx(seconds + LATENCY_S)
    assert CHIPS["h100"].nvlink == 450e9 and CHIPS["h100"].link_bandwidth == 50e9


# --- collectives of a program ---

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%x, %x)
}

%body (carry: (s32[], f32[64])) -> (s32[], f32[64]) {
  %carry = (s32[], f32[64]{0:T(128)}) parameter(0)
  %all-reduce.9 = f32[64]{0:T(128)S(1)} all-reduce(%part), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[64]{0:T(128)}) tuple(%i, %all-reduce.9)
}

%sent_later (x: f32[16]) -> f32[2] {
  %x.1 = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%x.1), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%never (x: f32[4]) -> f32[4] {
  ROOT %all-reduce.7 = f32[4]{0} all-reduce(%x.2), replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0:T(128)} parameter(0), sharding={replicated}
  %all-reduce.1 = (f32[10,3]{1,0:T(8,128)}, /*index=1*/bf16[8]{0:T(128)}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="jit(step)/psum"}
  %all-gather.2 = f32[128,128]{1,0:T(8,128)} all-gather(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %gather-start = (f32[16]{0}, f32[128]{0}) all-gather-start(%d), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %gather-done = f32[128]{0} all-gather-done(%gather-start)
  %permute = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
  %later = ((f32[16]{0}), f32[2]{0}, s32[]) async-start(%f), calls=%sent_later
  %loop = (s32[], f32[64]{0:T(128)}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %fusion.3 = f32[64]{0} fusion(%all-reduce.1, %all-gather.2), kind=kLoop, calls=%add
  ROOT %out.1 = f32[64]{0:T(128)} copy(%fusion.3)
}
"""


def test_collectives_of_a_program():
    """Kinds, types, groups, loops, and what runs beside something else."""
    assert sorted(find_collectives(PROGRAM, 8)) == sorted(
        [
            Collective("all-reduce", "bf16+f32", 4 * 30 + 2 * 8, 8),
            Collective("all-gather", "f32", 4 * 128 * 128, 4),
            # Started, but waited for at once.
            Collective("all-gather", "f32", 4 * 128, 8),
            Collective("collective-permute", "f32", 4 * 32, 8, asynchronous=True),
            Collective("reduce-scatter", "f32", 4 * 16, 8, asynchronous=True),
            Collective("all-reduce", "f32", 4 * 64, 2, times=4),
        ]
    )


def test_memory_traffic_of_a_program():
    """Operands and results of what runs, by hand; `%a` to `%f` are not defined."""
    sent = 136 + 65536 + 576 + 264 + (8 + 64) + 4 * 256
    fusion, copy = 256 + 136 + 65536, 256 + 256
    assert memory_traffic(PROGRAM) == sent + fusion + copy


def test_collectives_of_a_step_that_compiles_here():
    """Against what the step says it sends; loops of microbatches count each time."""
    counts = {}
    for microbatch in (0, 8):
        config = pretrain_config(**RESNET, microbatch_size=microbatch)
        plan = create_plan(
            config, parallel.create_mesh(), num_classes=10, num_examples=1297
        )
        text = plan.lower().compile().as_text()
        found = find_collectives(text, 8)
        counts[microbatch] = sum(one.times for one in found)
        reduced = sum(one.bytes * one.times for one in found if "reduce" in one.kind)
        params = sum(x.size for x in jax.tree.leaves(plan.abstract_state().params))
        assert reduced >= 4 * params  # the gradients, in float32
        assert all(one.devices == 8 for one in found)
        assert not any("bf16" in one.dtypes for one in found)
    norms = counts[0] - 8  # all but a handful are BatchNorm's, once each microbatch
    assert counts[8] > counts[0] + norms // 2 > 10


@pytest.mark.parametrize(
    "kind, sent",
    [
        ("all-reduce", 2 * 7 / 8 * 800),
        ("all-gather", 7 / 8 * 800),
        ("reduce-scatter", 7 / 8 * 800),
        ("collective-permute", 800),
    ],
)
def test_bytes_that_a_device_sends(kind, sent):
    """A ring over 8 devices, by hand."""
    assert Collective(kind, "f32", 800, 8).sent == pytest.approx(sent)
    assert Collective(kind, "f32", 800, 1).sent == (
        800 if kind == "collective-permute" else 0
    )


def test_sums_by_kind():
    one = Collective("all-reduce", "f32", 100, 8)
    found = by_kind([one, one._replace(times=3), one._replace(dtypes="bf16")])
    assert found == [
        one._replace(bytes=400, times=4),
        one._replace(dtypes="bf16"),
    ]


# --- roofline ---

V5E = Topology("v5e", "2x4")


def test_the_longest_of_what_overlaps_and_all_that_blocks():
    """Operations, traffic and links of a v5e chip, by hand."""
    wire = 2 * 7 / 8 * 8e6 / 200e9 + LATENCY_S
    reduce = Collective("all-reduce", "f32", 8_000_000, 8, times=3)
    times = step_time(V5E, flops=197e9, traffic=819e7, collectives=[reduce])
    assert times.compute == pytest.approx(1e-3)
    assert times.memory == pytest.approx(1e-2)
    assert times.blocking == pytest.approx(3 * wire)
    assert times.total == pytest.approx(1e-2 + 3 * wire) and times.bound == "memory"
    aside = step_time(
        V5E,
        flops=197e10 * 2,
        traffic=819e7,
        collectives=[reduce._replace(asynchronous=True)],
    )
    assert aside.total == pytest.approx(2e-2) and aside.bound == "compute"
    many = reduce._replace(times=1000)
    assert step_time(V5E, flops=1, traffic=1, collectives=[many]).bound == "collectives"


# --- verdicts ---


def described(
    topology=V5E,
    *,
    memory=None,
    traffic=1e9,
    refusal="",
    rate=None,
    cores=10,
    **changes,
):
    plan = create_plan(
        pretrain_config(batch_size=1024, **changes),
        parallel.create_mesh(),
        num_classes=10,
        num_examples=1297,
    )
    memory = memory or StepMemory(10**9, 3 * 10**9)
    sent = [] if refusal else [Collective("all-reduce", "f32", 4000, 8)]
    compiled = Compiled(memory, traffic, sent, 61.0, refusal)
    data = Data(1297, 10, 110_000, opened=rate is not None, rate=rate)
    found = describe(plan, topology, compiled, data, flops=1e9, host_cores=cores)
    json.dumps(found)
    return found, as_text({"config": "FILE"} | found)


def test_a_plan_that_fits():
    found, text = described()
    assert found["fits"] and "verdict: fits, 24% of the memory" in text
    assert "4 GB a device of 16.9 GB: 1 GB for state and batch, 3 GB" in text
    assert "the data were not opened" in text and "no host was measured" in text
    seconds = 1e9 / 819e9 + 2 * 7 / 8 * 4000 / 200e9 + LATENCY_S
    assert found["step"]["seconds"] == pytest.approx(seconds)
    steps = found["run"]["steps"]
    assert found["run"]["hours"] == pytest.approx(steps * seconds / 3600)
    assert found["run"]["images"] == 1024 * steps
    assert found["input"]["images_per_s"] == pytest.approx(1024 / 2 / seconds)
    assert found["input"]["bytes_per_s"] == pytest.approx(1024 / 2 / seconds * 110_000)
    assert "1 x all-reduce f32 over 8 devices" in text and "compiled in 1m01s" in text


def test_what_would_make_it_fit():
    """Four fifths of the working memory fit: half of the images, or twice the chips."""
    held = 10**9
    room = CHIPS["v5e"].memory - held
    found, text = described(memory=StepMemory(held, int(room / 0.8)))
    assert not found["fits"] and "not input-bound" not in text
    assert "does not fit" in text and "--config.microbatch_size=512," in text
    assert "--config.encoder.remat=True" in text
    assert "it fits on v5e:4x4, 16 chips" in text


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of "
        "15.75G hbm. Exceeded hbm capacity by 4.25G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (20.00G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_the_compiler_refuses(message, monkeypatch):
    """Its own account of the memory leads to the same advice."""
    plan = create_plan(
        pretrain_config(batch_size=1024),
        parallel.create_mesh(),
        num_classes=10,
        num_examples=1297,
    )

    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(type(plan), "lower", lambda plan: Lowered())
    compiled = forecast.compile_step(plan, V5E)
    assert sum(compiled.memory) == 20 * 2**30
    found, text = described(memory=compiled.memory, refusal=compiled.refusal)
    assert not found["fits"] and found["step"]["seconds"] is None
    assert "--config.microbatch_size=512," in text and "it fits on v5e:4x4" in text
    assert "step time" not in text


def test_other_failures_of_the_compiler_are_no_verdict(monkeypatch):
    class Broken:
        config = pretrain_config()

        def lower(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        forecast.compile_step(Broken(), V5E)


def test_input_bound():
    """A host of 10 cores makes 1,000 images/s; a host of the slice has 112."""
    found, text = described(rate=1000.0)
    needed = found["input"]["images_per_s"]
    assert found["input"]["cores"] == pytest.approx(needed / 100)
    slower = needed / (100 * 112)
    assert slower > 1
    hours = found["run"]["hours"] * slower
    assert f"needs {needed / 100:,.0f} cores and has 112" in text
    assert f"the run {hours:,.1f} h" in text
    enough, _ = described(rate=1000.0, traffic=100e9)
    (verdict,) = [v for v in enough["verdict"] if "input" in v]
    assert verdict.startswith("not input-bound")


def test_bound_by_collectives_names_the_setting():
    _, text = described(traffic=1e5)
    assert "--config.encoder.batch_norm_devices" in text


@pytest.mark.parametrize("counts", [True, False])
def test_microbatches_move_the_memory_in_each_part(counts, monkeypatch):
    """The compiler counts the body of a loop once, if it counts at all."""

    class Program:
        def compile(self, options):
            return self

        def cost_analysis(self):
            return {"bytes accessed": 100.0} if counts else None

        def memory_analysis(self):
            return None

        def as_text(self):
            return PROGRAM

    plan = create_plan(
        pretrain_config(microbatch_size=8),
        parallel.create_mesh(),
        num_classes=10,
        num_examples=1297,
    )
    monkeypatch.setattr(type(plan), "lower", lambda plan: Program())
    compiled = forecast.compile_step(plan, V5E)
    assert compiled.traffic == (200.0 if counts else memory_traffic(PROGRAM))
    assert len(compiled.collectives) == 6


# --- data ---


def test_data_are_opened_and_the_host_is_measured(monkeypatch):
    monkeypatch.setattr(forecast, "MEASURE_S", 0.0)
    data = forecast.look_at_data(pretrain_config(), measure=False)
    assert (data.num_examples, data.num_classes, data.rate) == (1297, 10, None)
    assert data.opened and data.whole_images
    monkeypatch.setattr(forecast, "MEASURE_S", 0.01)
    assert forecast.look_at_data(pretrain_config(), measure=True).rate > 0


def test_data_that_are_not_here():
    config = pretrain_config(**{"data.name": "imagenet2012"})
    assert forecast.look_at_data(config, measure=True)[:2] == (1_281_167, 1000)
    config.data.samples_per_class = 13
    assert forecast.look_at_data(config, measure=True)[:2] == (13_000, 1000)
    config.data.fake = True
    assert forecast.look_at_data(config, measure=False).opened
    config.data.fake = False
    config.data.name = "oxford_iiit_pet"
    with pytest.raises(ValueError, match="--config.data.dir"):
        forecast.look_at_data(config, measure=True)


# --- the command ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5e:5x5"], "no topology 'v5e:5x5'; known: v4:2x2x1"),
        (["--topology=v5e:2x4"], 'pip install "jax[tpu]"'),
        (["--topology=h100:1x8"], 'pip install "jax[cuda13]"'),
        (
            ["--topology=v5e:2x4", "--config.mode=evaluate"],
            "mode=evaluate trains nothing",
        ),
        (
            [
                "--topology=v5e:2x4",
                "--config.mode=linear_eval",
                "--config.probe.solver=lbfgs",
            ],
            "probe.solver=lbfgs takes no steps",
        ),
        (["--topology=v5e:2x4", "--host_rate=0"], "--host_rate=0.0 must be above 0"),
        (["--topology=v5e:2x4", "--config.batch_siz=8"], "--config.batch_size"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        tool.main(["--config=configs/digits.py", *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_prints_a_plan(capsys, monkeypatch):
    """For the devices that are here, in place of a slice."""
    mesh = parallel.create_mesh(jax.devices()[:4])
    monkeypatch.setattr(forecast, "create_abstract_mesh", lambda topology: mesh)
    monkeypatch.setattr(forecast, "MEASURE_S", 0.0)
    command = ["--config=configs/digits.py", "--topology=v5e:2x2"]
    small = ["--config.encoder.width=0.25", "--config.batch_size=16"]
    tool.main([*command, *small, "--host_rate=1000"])
    printed = capsys.readouterr()
    assert "compiling for v5e:2x2" in printed.err
    assert "verdict: fits" in printed.out and "make 1,000" in printed.out
    tool.main([*command, *small, "--json", "--host_rate=1000", "--host_cores=4"])
    found = json.loads(capsys.readouterr().out)
    assert found["input"]["measured_cores"] == 4 and found["fits"] is True
    assert found["changes"] == ["encoder.width=0.25", "batch_size=16"]
    with pytest.raises(SystemExit) as exit:
        tool.main([*command, "--config.batch_size=18"])
    assert exit.value.code == 2
    assert "batch size 18 is not divisible by the 4 devices" in capsys.readouterr().err


# --- with the compilers ---


@pytest.mark.aot
@pytest.mark.parametrize("kind", SHAPES)
def test_the_compiler_knows_every_slice(kind):
    """libtpu has each listed slice, with as many devices and hosts."""
    found = compiled_for_tpu(
        f"""
from supcon_jax.planning.topologies import create_abstract_mesh, known_topologies
wrong = []
for topology in known_topologies({kind!r}):
    devices = create_abstract_mesh(topology).devices.flat
    hosts = len({{device.process_index for device in devices}})
    if (len(devices), hosts) != (topology.num_devices, topology.num_hosts):
        wrong.append((topology.name, len(devices), hosts))
print("found", wrong)
"""
    )
    assert found == "[]"


@pytest.mark.aot
def test_a_plan_for_a_tpu():
    """Gradients are summed in float32; only the forward pass sends all projections."""
    found = compiled_for_tpu(
        """
import json
from supcon_jax.planning import forecast
from supcon_jax.planning.topologies import find_topology
from tests.runs import RESNET, pretrain_config

sent = []
def find(*arguments, real=forecast.find_collectives):
    sent.extend(real(*arguments))
    return sent
forecast.find_collectives = find
config = pretrain_config(**{"batch_size": 1024, "encoder.dtype": "auto"})
found = forecast.plan_run(config, find_topology("v5e:2x4"), host_rate=1e5)
views = 4 * 1024 * 2 * config.projection.output_dim
large = [one.kind for one in sent if one.bytes >= views]
print("found", json.dumps([found, large]))
"""
    )
    plan, large = json.loads(found)
    assert plan["fits"] and plan["memory"]["needed"] > 1e5
    assert plan["step"]["seconds"] > 0 and plan["traffic"] > 1e7
    assert large in (["all-gather"], ["all-reduce"])
    sent = plan["collectives"]
    assert sum(one["times"] for one in sent) > 10
    assert not any("bf16" in one["dtypes"] for one in sent)


@pytest.mark.aot
def test_a_plan_that_does_not_fit_a_tpu():
    """The compiler's refusal becomes a verdict with the settings that help."""
    found = compiled_for_tpu(
        """
from configs import supcon_cifar10
from supcon_jax.planning.forecast import plan_run
from supcon_jax.planning.topologies import find_topology

config = supcon_cifar10.get_config()
config.batch_size = 2**20
config.encoder.name = "resnet8"
found = plan_run(config, find_topology("v5e:2x2"), host_rate=1e5)
print("found", found["fits"], *found["verdict"])
"""
    )
    assert found.startswith("False") and "microbatch_size=" in found
    assert "it fits on v5e:" in found
