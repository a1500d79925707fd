"""Random values at every config key: a plan, or one line that names the flag."""

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import digits, linear_digits
from supcon_jax import parallel
from supcon_jax.config import KEYS, check_config, flatten
from supcon_jax.plan import create_plan

NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([1e-300, 1e300, 0.5, 2**31, 2**63, -1]),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["none", "*", "[", "auto", "\n"])
)
SCALARS = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none())
ANY = st.one_of(SCALARS, st.lists(SCALARS, max_size=4).map(tuple))


def with_value(config, key, value):
    """The config with a value that its type check would not let through, too."""
    *sections, name = key.split(".")
    with config.unlocked():
        section = config
        for part in sections:
            section = section[part]
        with section.ignore_type():
            section[name] = value
    return config


@pytest.mark.parametrize("key", KEYS)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(value=ANY)
def test_any_value_is_taken_or_refused_in_one_line(key, value):
    config = with_value(digits.get_config(), key, value)
    try:
        check_config(config)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
        assert "--config." in str(refusal)
        return
    default, value = KEYS[key].default, flatten(config.to_dict())[key]
    assert type(value) is type(default) or (
        isinstance(default, float) and type(value) is int
    )


def typical(key):
    """Values of the kind that a key has, in and out of its range."""
    default = KEYS[key].default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-2, 300)
    if isinstance(default, float):
        return st.floats(-0.5, 3.0)
    if isinstance(default, tuple):
        element = st.sampled_from([*default, 0.5, 1, "cutout", "wandb", "bias"])
        return st.lists(element, max_size=3).map(tuple)
    return st.sampled_from([default, "none", "all", "one", "auto", "constant", "adamw"])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(data=st.data())
def test_several_random_values_are_a_plan_or_one_line(data):
    """What passes the check can be planned: no error of another kind later."""
    base = data.draw(st.sampled_from([digits, linear_digits]))
    config = base.get_config()
    config.encoder.width = 0.25
    for key in data.draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=3)):
        config = with_value(config, key, data.draw(typical(key), label=key))
    mesh = parallel.create_mesh(jax.devices()[: data.draw(st.sampled_from([1, 4]))])
    try:
        plan = create_plan(config, mesh, num_classes=10, num_examples=1297)
    except ValueError as refusal:
        assert "\n" not in str(refusal) and "--config." in str(refusal), refusal
        return
    plan.abstract_state()
