"""What a step needs in memory is said, and what does not fit is refused in words."""

import logging

import jax
import jax.numpy as jnp
import pytest

from supcon_jax import linear_eval, parallel, pretrain
from supcon_jax.run import memory
from supcon_jax.run.plan import create_plan
from supcon_jax.steps import contrastive, linear
from tests.runs import pretrain_config


@pytest.fixture(scope="module")
def plan():
    return create_plan(
        pretrain_config(), parallel.create_mesh(), num_classes=10, num_examples=1297
    )


def compiled(side):
    """A program that holds 4 side^2 bytes on each device and needs as much to work."""
    mesh = parallel.create_mesh()
    everywhere = parallel.replicated(mesh)

    def function(x):
        return jnp.sum(jnp.sort(jnp.sort(x, 0) @ x, 1))

    jitted = jax.jit(function, in_shardings=everywhere, out_shardings=everywhere)
    return jitted.lower(jax.ShapeDtypeStruct((side, side), jnp.float32)).compile()


def test_step_memory_counts_arguments_and_what_lies_between():
    needs = memory.step_memory(compiled(256))
    array = 4 * 256**2
    assert array <= needs.held <= array + 1000
    assert array <= needs.working <= 5 * array


def test_line_about_memory(plan, caplog):
    with caplog.at_level(logging.INFO, logger="supcon_jax"):
        memory.check_memory(plan, compiled(256))
    assert "memory: a step needs" in caplog.text and "for each view" in caplog.text


def test_a_step_that_cannot_fit_is_refused_before_it_runs(plan, monkeypatch):
    needs = memory.step_memory(compiled(256))
    limit = needs.held + needs.working // 2
    monkeypatch.setattr(memory, "device_memory", lambda device: limit)
    with pytest.raises(ValueError) as refusal:
        memory.check_memory(plan, compiled(256))
    message = str(refusal.value)
    assert "16 images x 2 views does not fit" in message and "\n" not in message
    assert "--config.microbatch_size=8," in message  # half the room, half the images
    for way in ("--config.encoder.remat=True", "--config.batch_size", "more devices"):
        assert way in message


def test_no_microbatch_is_suggested_that_does_not_fit(plan, monkeypatch):
    needs = memory.step_memory(compiled(256))
    message = str(memory.out_of_memory(plan, needs, needs.held + needs.working // 9))
    assert "microbatch" not in message  # 8 devices cannot take less than an image each
    assert "remat" in message


@pytest.mark.parametrize("mode", ["pretrain", "linear_eval"])
def test_the_runtimes_error_becomes_one_line(mode, tmp_path, monkeypatch):
    """As when a device runs out during a step, or the compiler finds no room."""
    config = pretrain_config(**{"mode": mode})
    module = pretrain if mode == "pretrain" else linear_eval
    steps = contrastive if mode == "pretrain" else linear
    if mode == "linear_eval":
        config.pretrained = "random"

    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
            "Used 22.28G of 15.75G hbm. Exceeded hbm capacity by 6.53G."
        )

    monkeypatch.setattr(steps, "train_step", fail)
    with pytest.raises(ValueError, match="Used 22.28G of 15.75G hbm") as refusal:
        getattr(module, mode)(config, tmp_path)
    assert "--config.microbatch_size" in str(refusal.value)


def test_other_errors_stay_what_they_are(plan):
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(plan):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_device_memory_of_a_cpu_is_the_machines():
    whole = memory.device_memory(jax.devices()[0]) * jax.local_device_count()
    assert 2**28 < whole < 2**50
