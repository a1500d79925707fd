"""The edge of the program: what is one line, with which exit code, and what is a bug."""

import re

import jax
import numpy as np
import pytest

from supcon_jax.cli import one_line_errors
from supcon_jax.config import check as config
from supcon_jax.losses import supcon_loss
from supcon_jax.run.stop import Stopped


def ended(action, capsys):
    """Exit code and standard error of an action at the edge."""
    with pytest.raises(SystemExit) as exit, one_line_errors():
        action()
    return exit.value.code, capsys.readouterr().err


def raising(error):
    def action():
        raise error

    return action


def test_our_refusals_are_mistakes(capsys):
    code, told = ended(lambda: config.check_config(refused_config()), capsys)
    assert code == 2
    assert told == (
        "error: got batch_size=-1; allowed: at least 1, or 0 with data.name=folder "
        "(--config.batch_size)\n"
    )


def refused_config():
    from configs import digits

    found = digits.get_config()
    found.batch_size = -1
    return found


@pytest.mark.parametrize(
    "given, code", [(None, 0), ("75", 75), ("0", 0), ("256", 0), ("soon", 0)]
)
def test_a_stop_exits_with_the_code_that_the_launcher_wants(
    given, code, capsys, monkeypatch
):
    monkeypatch.delenv("SUPCON_STOPPED_CODE", raising=False)
    if given is not None:
        monkeypatch.setenv("SUPCON_STOPPED_CODE", given)
    assert ended(raising(Stopped("saved")), capsys) == (code, "")


def test_a_value_error_of_a_library_is_a_bug(capsys):
    code, told = ended(lambda: np.zeros(3).reshape(2, 2), capsys)
    assert code == 1
    assert "Traceback" in told and "this is a bug in supcon_jax" in told
    assert re.search(r"Python 3\.\d+\.\d+, jax \d", told)


def test_what_python_raises_in_our_own_lines_is_a_bug(capsys):
    """It has no words for the user."""

    def numbers():
        exec(compile("a, b = 1, 2, 3", config.__file__, "exec"))

    code, told = ended(numbers, capsys)
    assert code == 1 and "too many values" in told and "this is a bug" in told


def test_a_wrong_call_of_the_loss_is_a_mistake(capsys):
    code, told = ended(lambda: supcon_loss(np.zeros((4, 2), np.float32)), capsys)
    assert code == 2 and told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (OSError(28, "No space left on device"), "No space left on device", 1),
        (
            PermissionError(13, "Permission denied", "/a/b"),
            "/a/b: Permission denied",
            1,
        ),
        (FloatingPointError("the loss is nan"), "the loss is nan", 1),
        (MemoryError(), "memory is used up", 1),
        (KeyboardInterrupt("interrupted; go on"), "interrupted; go on", 130),
        (KeyboardInterrupt(), "interrupted", 130),
        (
            jax.errors.JaxRuntimeError("INTERNAL: lost\nmore"),
            "device failed: INTERNAL",
            1,
        ),
    ],
    ids=repr,
)
def test_faults_are_one_line(error, line, code, capsys):
    found, told = ended(raising(error), capsys)
    assert found == code
    assert line in told and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("y"), RuntimeError("z")])
def test_bugs_keep_their_traceback(error, capsys):
    code, told = ended(raising(error), capsys)
    assert code == 1 and "Traceback" in told and "please report it" in told
