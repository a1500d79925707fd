"""A trace of some steps: written once, and of no influence."""

import pytest

from supcon_jax import pretrain, profiling
from supcon_jax.checkpoint import restore_state
from supcon_jax.config.check import check_config
from supcon_jax.profiling import Window, parse_window
from supcon_jax.run import loop
from tests.runs import assert_trees_equal, pretrain_config


def config_with(**overrides):
    return pretrain_config(**{"knn.bank": 0} | overrides)


def test_windows():
    assert parse_window("") is None
    assert parse_window("3:3") == Window(3, 3)
    assert parse_window("4") == Window(11, 14)
    for text in ("0", "0:3", "5:4", "a", "3:", ":3", "1:2:3", "-1"):
        with pytest.raises(ValueError, match="allowed"):
            parse_window(text)
        config = config_with(profile_steps=text)
        with pytest.raises(ValueError, match=r"allowed: FIRST:LAST.*profile_steps\)"):
            check_config(config)


def test_a_trace_changes_nothing_and_is_made_once(tmp_path, caplog, monkeypatch):
    pretrain.pretrain(config_with(profile_steps="13:14"), tmp_path / "without")
    assert "profile_steps=13:14 begins after the last step, 12" in caplog.text
    assert not (tmp_path / "without/profile").exists()
    with monkeypatch.context() as patch:
        train = loop._Training._log

        def stop_at_10(self, at, metrics):
            if at == 10:
                raise KeyboardInterrupt
            return train(self, at, metrics)

        patch.setattr(loop._Training, "_log", stop_at_10)
        config = config_with(profile_steps="4:6", checkpoint_every=3)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, tmp_path / "with")
    (trace,) = (tmp_path / "with/profile/steps_4_to_6").rglob("*.trace.json.gz")
    assert trace.stat().st_size > 1000
    assert "profile: " in caplog.text and "perfetto" in caplog.text
    # It goes on from a step before the window, whose trace is there.
    for step in (6, 9):
        checkpoint = tmp_path / f"with/checkpoints/{step}"
        if checkpoint.exists():
            checkpoint.rename(tmp_path / f"kept_{step}")
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", None)
    pretrain.pretrain(config, tmp_path / "with")
    assert_trees_equal(
        *(restore_state(tmp_path / run).params for run in ("with", "without"))
    )


def test_a_run_that_ends_in_the_window_ends_the_trace(tmp_path):
    ended = profiling.traced(
        iter([(n, None, {}) for n in (1, 2, 3)]), Window(2, 9), tmp_path, start_step=0
    )
    assert [number for number, _, _ in ended] == [1, 2, 3]
    assert list((tmp_path / "steps_2_to_9").rglob("*.xplane.pb"))
    begun = profiling.traced(
        iter([(3, None, {})]), Window(3, 9), tmp_path, start_step=2
    )
    assert next(begun)[0] == 3
    begun.close()  # as an error in the run does
    assert list((tmp_path / "steps_3_to_9").rglob("*.xplane.pb"))
