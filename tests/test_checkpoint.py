"""Checkpoints: what is saved is what is restored, or it is said that it is not."""

import errno
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from supcon_jax import parallel
from supcon_jax.checkpoint import (
    Checkpointer,
    digest,
    manager,
    restore_encoder,
    saved_steps,
)
from supcon_jax.checkpoint import restore as checkpoint_restore
from tests.damage import KINDS, damage, files_of
from tests.runs import assert_trees_equal
from tests.small_step import BATCH, tiny_step

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def states():
    """The state after each of a few steps, with an average and batch statistics."""
    state, step = tiny_step(average=0.9)
    found, step = {}, jax.jit(step)
    for number in STEPS:
        state, _ = step(state, BATCH)
        found[number] = jax.device_get(state)
    return found


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A workdir with all of them."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir, keep=5)
    for number, state in states.items():
        told = {"train/loss": 0.1 * number}
        checkpointer.save(state, number, {}, health={"loss": 1.0 * number}, told=told)
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def restore(workdir, states):
    """The newest whole state, and what was saved with it."""
    mesh = parallel.create_mesh(jax.devices()[:1])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=parallel.replicated(mesh)
        ),
        states[1],
    )
    checkpointer = Checkpointer(workdir, keep=5)
    try:
        return checkpointer.restore_newest(abstract)
    finally:
        checkpointer.close()


def newest(workdir):
    return workdir / "checkpoints" / str(STEPS[-1])


def test_what_is_saved_is_restored(workdir, states, messages):
    state, saved = restore(workdir, states)
    assert_trees_equal(jax.device_get(state), states[3])
    assert saved["health"] == {"loss": 3.0}
    assert saved["told"] == {"train/loss": 0.1 * 3}
    assert messages == [] and not (workdir / "damaged_checkpoints").exists()


def test_a_save_of_eight_devices_compiles_nothing(states, tmp_path, caplog):
    """Training waits for it, and so does a machine that was given 30 s to end."""
    # A size that Orbax could cut into a piece for each device.
    state = states[1].replace(momentum={"keys": np.ones((64, 8), np.float32)})
    mesh = parallel.create_mesh(jax.devices())
    checkpointer = Checkpointer(tmp_path)
    on_devices = jax.device_put(state, parallel.replicated(mesh))
    with jax.log_compiles():
        checkpointer.save(on_devices, 1, {})
        checkpointer.close()
    assert "Compiling" not in caplog.text
    restored, _ = restore(tmp_path, {1: state})
    assert_trees_equal(jax.device_get(restored), state)


def test_nothing_saved(tmp_path, states):
    assert restore(tmp_path, states) is None


def trial(workdir, states, path, kind, rng):
    """Damages a file and restores; the step that came back, equal to what was saved."""
    damage(path, kind, rng)
    state, saved = restore(workdir, states)
    step = int(state.step)
    assert_trees_equal(jax.device_get(state), states[step])
    assert saved.get("health", {}) in ({"loss": float(step)}, {})
    return step


def every_file(workdir, states, kinds, seed):
    """Each file of the newest step in turn; how often each step came back."""
    rng = np.random.default_rng(seed)
    whole = workdir.with_name("whole")
    shutil.copytree(workdir, whole)
    counts = {step: 0 for step in STEPS}
    names = [path.relative_to(workdir) for path in files_of(newest(workdir))]
    for name in names:
        for kind in kinds(rng):
            shutil.rmtree(workdir)
            shutil.copytree(whole, workdir)
            counts[trial(workdir, states, workdir / name, kind, rng)] += 1
    return counts


def test_any_damage_to_any_file_falls_back_or_does_no_harm(workdir, states):
    """One kind of damage, drawn at random, for each file; the slow test has them all."""
    counts = every_file(workdir, states, lambda rng: [rng.choice(KINDS)], seed=0)
    assert counts[1] == 0 and counts[2] > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_damage_to_any_file_falls_back_or_does_no_harm(workdir, states, seed):
    counts = every_file(workdir, states, lambda rng: KINDS, seed)
    assert counts[1] == 0 and counts[2] > 20


def flip_a_weight(step):
    """One bit in the middle of a file of arrays."""
    arrays = [path for path in files_of(step) if path.parent.name == "d"]
    path = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_and_told(workdir, states, messages):
    flip_a_weight(newest(workdir))
    state, _ = restore(workdir, states)
    assert_trees_equal(jax.device_get(state), states[2])
    (message,) = messages
    assert "step 3 is damaged" in message and "that of step 2" in message
    # It is out of the way of the step that will be saved in its place.
    assert saved_steps(workdir) == [1, 2]
    assert [p.name for p in (workdir / "damaged_checkpoints").iterdir()] == ["3_0"]
    checkpointer = Checkpointer(workdir, keep=5)
    checkpointer.save(states[3], 3, {})
    checkpointer.close()
    assert_trees_equal(jax.device_get(restore(workdir, states)[0]), states[3])


def test_all_steps_damaged(workdir, states):
    """Nothing starts anew in silence, and nothing is moved."""
    for step in STEPS:
        flip_a_weight(workdir / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="none of the 3 checkpoints .*; step 3: "):
        restore(workdir, states)
    assert saved_steps(workdir) == [1, 2, 3]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EACCES, "Permission denied"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        ValueError("Error reading x [source locations='a' os_error_code='5']"),
        ValueError("UNAVAILABLE: the bucket does not answer"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(workdir, states, monkeypatch, error):
    """Nothing is put aside, no older step is taken, and the same command goes on."""
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(manager, "read_step", fails)
        patch.setattr(checkpoint_restore, "read_step", fails)
        with pytest.raises(type(error) if type(error) is not ValueError else OSError):
            restore(workdir, states)
        with pytest.raises(type(error)):
            restore_encoder(workdir)
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    assert_trees_equal(jax.device_get(restore(workdir, states)[0]), states[3])


def test_a_resumed_run_keeps_the_best_step_of_all(states, tmp_path):
    """What was measured is read from metrics.jsonl, as the run wrote it."""
    lines, values = "", [0.9, 0.1, 0.2, 0.3, 0.4]
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step, value in enumerate(values, 1):
        if step == 5:  # killed, and resumed
            checkpointer.close()
            (tmp_path / "metrics.jsonl").write_text(lines)
            checkpointer = Checkpointer(tmp_path, keep=2)
        checkpointer.save(states[1], step, {"knn/top1": value})
        lines += json.dumps({"step": step, "knn/top1": value}) + "\n"
    checkpointer.close()
    assert saved_steps(tmp_path) == [1, 4, 5]


def test_a_save_does_not_ask_whether_the_job_was_preempted(
    states, tmp_path, monkeypatch
):
    """JAX stops a job at the largest number that was asked with; the loop counts its own."""
    asked = []
    module = ocp.checkpoint_manager.utils
    monkeypatch.setattr(module, "reached_preemption", lambda step: asked.append(step))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(states[1], 1, {})
    checkpointer.close()
    assert saved_steps(tmp_path) == [1] and asked == []


def test_an_encoder_for_use_is_verified_too(workdir, states, messages):
    variables = restore_encoder(workdir)
    expected = {
        name: getattr(states[3], name)["encoder"] for name in ("params", "batch_stats")
    }
    assert_trees_equal(jax.device_get(variables), expected)
    flip_a_weight(newest(workdir) / "encoder")
    variables = restore_encoder(workdir)
    assert_trees_equal(jax.device_get(variables["params"]), states[2].params["encoder"])
    assert "step 3" in messages[0] and "taking that of step 2" in messages[0]
    # A step that was asked for by number is that step or an error.
    with pytest.raises(ValueError, match="can be restored; step 3: "):
        restore_encoder(workdir, step=3)
    # Reading changes nothing in somebody's workdir.
    assert saved_steps(workdir) == [1, 2, 3]


def test_a_checkpoint_of_an_older_version_has_no_digests(workdir, states, messages):
    shutil.rmtree(newest(workdir) / "record")
    state, saved = restore(workdir, states)
    assert int(state.step) == 3 and saved.get("health", {}) == {}
    assert "has no digests" in messages[0]


def test_digest_sees_names_types_shapes_and_bytes():
    tree = {"a": np.zeros(3, np.float32), "b": {"c": np.ones(2, np.int32)}}
    assert digest(tree) == digest({"b": {"c": np.ones(2, np.int32)}, "a": tree["a"]})
    for other in (
        {"x": tree["a"], "b": tree["b"]},
        {"a": np.zeros(3, np.int32), "b": tree["b"]},
        {"a": np.zeros((3, 1), np.float32), "b": tree["b"]},
        {"a": np.array([0, 0, -0.0], np.float32), "b": tree["b"]},
    ):
        assert digest(other) != digest(tree)
