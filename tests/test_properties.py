"""Random values at every config key: a plan, a run, or one line that names the flag."""

import re

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import digits, linear_digits
from supcon_jax import parallel, pretrain
from supcon_jax.cli import describe
from supcon_jax.config.check import check_config, flatten
from supcon_jax.config.keys import KEYS
from supcon_jax.run.plan import create_plan
from tests.runs import pretrain_config

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


def candidates(key):
    """Values that the key's rule allows, other than the default: two of numbers."""
    default, rule = KEYS[key].default, KEYS[key].rule
    if isinstance(default, bool):
        values = [not default]
    elif isinstance(default, int):
        values = [0, 1, 2, 7, 300]
    elif isinstance(default, float):
        values = [0.0, 1e-6, 0.3, 1.0, 3.0, 1e9]
    elif isinstance(default, tuple):
        names = re.findall(r"[\w.]+", rule.allowed())
        values = [(), *((name,) for name in names), (0.5, 1.0), (8,), (1.0, 0.0, 1.0)]
    else:
        values = [*re.findall(r"[\w.]+", rule.allowed()), "", "no such thing"]
    if key == "encoder.name":  # the others are the same code, and minutes to compile
        values = ["resnet8", "resnet18", "wrn16_4", "no such thing"]
    allowed = [v for v in values if v != default and KEYS[key].allows(v)]
    numbers = isinstance(default, (int, float))
    return [*{allowed[0], allowed[-1]}] if numbers and allowed else allowed


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in KEYS if key != "mode"])
def test_any_allowed_value_is_a_run_or_one_line(key, tmp_path):
    """Two steps of training with each: it ends, or says in one line why it cannot."""
    for number, value in enumerate(candidates(key)):
        config = pretrain_config(total_steps=2, log_every=1)
        config = with_value(config, key, value)
        if config.total_steps > 2:
            config.total_steps = 2
        try:
            pretrain.pretrain(config, str(tmp_path / str(number)))
        except Exception as error:
            told = describe(error)
            assert told is not None and "\n" not in told[0], (value, error)
            assert told[1] == 1 or "--config." in told[0], (value, told)
