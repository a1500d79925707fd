"""The loop that pretraining and linear evaluation share.

It is given an opened run and a function that evaluates; it restores, compiles once,
feeds, reports, saves and ends the run.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from supcon_jax import hosts, memory, parallel, report
from supcon_jax.checkpoint import Checkpointer, saved_steps
from supcon_jax.logs import add_log_file, format_duration
from supcon_jax.metrics import on_end
from supcon_jax.plan import Plan
from supcon_jax.run import Run, build_train_batches
from supcon_jax.steps.state import TrainState
from supcon_jax.writers import MetricWriter

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
PyTree = Any
Evaluate = Callable[[TrainState], Metrics]


def train(
    run: Run,
    *,
    evaluate: Evaluate,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> dict[str, Any]:
    """Trains a run to its last step, from its newest checkpoint if it has one.

    It always evaluates and saves at the last step. The host is one step ahead: it waits
    for a step, and fetches its metrics, after it has dispatched the next one, so the
    device never waits; batches are on their way to it two steps ahead.

    Args:
      run: see `run.open_run`.
      evaluate: metrics of a state.
      on_log: called with the metrics of every progress line.

    Returns:
      The metrics of the final line.

    Raises:
      FloatingPointError: the loss is not finite; nothing is saved after it.
      ValueError: the step does not fit into memory.
    """
    if run.finished is not None:
        logger.info("this run is complete; another --workdir starts a new one")
        if not saved_steps(run.workdir):
            logger.warning(
                "warning: its checkpoints are gone, so nothing can be evaluated or "
                "continued from it; another --workdir trains it again"
            )
        return report.report_end(run, run.finished)
    log_file = add_log_file(run.workdir)
    checkpointer = Checkpointer(run.workdir, keep=run.config.keep_checkpoints)
    try:
        with (
            hosts.Watchdog(run.config.hosts.watchdog_minutes),
            _interrupts_between_steps() as stop_requested,
            memory.explained(run.plan),
        ):
            final = _fit(run, checkpointer, evaluate, on_log, stop_requested)
        return report.report_end(run, final)
    except jax.errors.JaxRuntimeError as error:
        hosts.check_peers(error)  # before the save under way waits for a dead one
        raise
    except KeyboardInterrupt:
        checkpointer.wait()
        raise KeyboardInterrupt(_where_it_goes_on(checkpointer)) from None
    finally:
        # Also after an interrupt: the save that is under way becomes whole.
        checkpointer.close()
        logging.getLogger("supcon_jax").removeHandler(log_file)
        log_file.close()


def _fit(
    run: Run,
    checkpointer: Checkpointer,
    evaluate: Evaluate,
    on_log: Callable[[int, Metrics], None],
    stop_requested: threading.Event,
) -> Metrics:
    plan, frozen = run.plan, run.frozen
    config, total_steps = plan.config, plan.total_steps
    state = restore_or_init(checkpointer, plan)
    start_step = int(state.step)
    report.log_start(run, state)
    host_batches = build_train_batches(
        config, run.train_source, run.sampler, start_step=start_step
    )
    host_batches = report.measure_input(host_batches, config.batch_size)
    batches = parallel.prefetch_to_devices(host_batches, run.mesh)
    # The first batch is on its way while the step is compiled.
    batches = itertools.chain([next(batches)], batches)
    hosts.beat("compiling", patience=6)
    start = time.monotonic()
    compiled = plan.lower().compile()
    logger.info("compiled train_step in %.1f s", time.monotonic() - start)
    memory.check_memory(plan, compiled)
    writer = MetricWriter(
        run.workdir,
        total_steps=total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        start_step=start_step,
        writers=config.writers,
        project=config.project,
        config=config.to_dict(),
    )
    with contextlib.closing(writer):
        meter = _Meter(start_step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        last: Metrics = {}

        def log_metrics(at: int, device_metrics: dict[str, jax.Array]) -> Metrics:
            metrics = _fetch(at, device_metrics)
            metrics["train/images_per_sec"] = config.batch_size * meter.read(at)
            if at < total_steps:
                writer.write(at, metrics)
            writer.log_progress(
                at, metrics, meter.eta_s(total_steps - at, config.eval_every)
            )
            on_log(at, metrics)
            return metrics

        first_step = start_step + 1
        steps = run_steps(
            compiled, state, batches, frozen, first=first_step, last=total_steps
        )
        for number, state, device_metrics in steps:
            if stop_requested.is_set():
                raise KeyboardInterrupt
            if pending is not None:
                last = log_metrics(*pending)
                pending = None
            first, final = number == first_step, number == total_steps
            if number % config.log_every == 0 or first or final:
                pending = (number, device_metrics)
            eval_due, save_due = (
                every > 0 and number % every == 0 and not final
                for every in (config.eval_every, config.checkpoint_every)
            )
            metrics = {}
            if eval_due or save_due:
                _check_finite(state, number)  # a bad state is neither judged nor saved
                with meter.pause():
                    if eval_due:
                        metrics = _evaluate(evaluate, state, number)
                        writer.write(number, metrics)
                        meter.eval_s = meter.paused_now()
                    if save_due:
                        hosts.beat(f"saving step {number}")
                        checkpointer.save(state, number, metrics)
        if pending is not None:
            last = log_metrics(*pending)

        _check_finite(state, total_steps)
        metrics = _evaluate(evaluate, state, total_steps)
        hosts.beat(f"saving step {total_steps}")
        if checkpointer.latest_step() != total_steps:
            checkpointer.save(state, total_steps, metrics)
        checkpointer.wait()
        final_metrics = last | metrics
        writer.write(total_steps, final_metrics, final=True)
        logger.info(
            "finished %d steps in %s", total_steps, format_duration(writer.wall_s())
        )
        return final_metrics


def _where_it_goes_on(checkpointer: Checkpointer) -> str:
    step = checkpointer.latest_step()
    if step is None:
        return (
            "interrupted before anything was saved: the same command starts anew "
            "(--config.checkpoint_every=STEPS saves on the way)"
        )
    return f"interrupted; the same command goes on from the last save, of step {step}"


@contextlib.contextmanager
def _interrupts_between_steps() -> Iterator[threading.Event]:
    """Ctrl-C stops the run after the step at hand; a second one stops it at once.

    In the middle of a save, whose threads share the interpreter, it could be lost, or
    leave them waiting for each other.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested  # only the main thread hears of signals
        return

    def request(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = signal.signal(signal.SIGINT, request)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)


def run_steps(
    compiled: jax.stages.Compiled,
    state: TrainState,
    batches: Iterator[dict[str, jax.Array]],
    frozen: tuple[PyTree, ...] = (),
    *,
    first: int = 1,
    last: int,
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Each step's number, state and metrics, which the device may still compute.

    One step ahead keeps the device busy; more would pile up batches on it.

    Args:
      compiled: `plan.lower().compile()`.
      state: before the first step; given away.
      batches: on the devices.
      frozen: what the step reads and does not train.
      first, last: numbers of the steps.
    """
    metrics: dict[str, jax.Array] = {}
    for number in range(first, last + 1):
        before = metrics
        hosts.beat(f"step {number}")
        state, metrics = compiled(state, next(batches), *frozen)
        jax.block_until_ready(before)
        yield number, state, metrics


def restore_or_init(checkpointer: Checkpointer, plan: Plan) -> TrainState:
    """The newest saved state, or a new one where there is none; replicated.

    A restored state costs no compilation of `init`.
    """
    replicated = parallel.replicated(plan.mesh)
    latest = checkpointer.latest_step()
    if latest is None:
        # Runs once, and is mostly random numbers: on a CPU, optimising the program takes
        # four times as long as compiling and running it plainly.
        plain = {"xla_backend_optimization_level": 0}
        options = plain if plan.platform == "cpu" else None
        return jax.jit(plan.init, out_shardings=replicated, compiler_options=options)()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        plan.abstract_state(),
    )
    state = checkpointer.restore(abstract, latest)
    logger.info("resumed at step %d", latest)
    return state


class _Meter:
    """Seconds a step takes, evaluations and checkpoints not counted."""

    def __init__(self, step: int):
        self._step, self._since, self._paused = step, time.monotonic(), 0.0
        self._pause_start = 0.0
        self._step_s = 0.0
        self.eval_s = 0.0  # seconds of the last evaluation

    def read(self, step: int) -> float:
        """Steps a second since the last reading."""
        elapsed = time.monotonic() - self._since - self._paused
        self._step_s = elapsed / (step - self._step)
        self._step, self._since, self._paused = step, time.monotonic(), 0.0
        return 1 / self._step_s

    def eta_s(self, steps: int, eval_every: int) -> float:
        """Seconds that so many steps and their evaluations will take."""
        evals = steps // eval_every if eval_every else 1
        return steps * self._step_s + evals * self.eval_s

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._pause_start = time.monotonic()
        yield
        self._paused += self.paused_now()

    def paused_now(self) -> float:
        """Seconds since the pause began."""
        return time.monotonic() - self._pause_start


def _fetch(step: int, device_metrics: dict[str, jax.Array]) -> Metrics:
    """Metrics as numbers; waits for the device."""
    metrics = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
    if not math.isfinite(metrics["train/loss"]):
        _diverged(f"the loss is {metrics['train/loss']} at step {step}")
    return metrics


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _check_finite(state: TrainState, step: int) -> None:
    """The loss of a step is of the parameters before it; this looks at those after."""
    if not _all_finite((state.params, state.batch_stats)):
        _diverged(f"parameters are not finite after step {step}")


def _diverged(what: str) -> NoReturn:
    raise FloatingPointError(
        f"{what}; lower --config.optimizer.learning_rate or lengthen the warm-up "
        "(--config.optimizer.warmup_epochs); no checkpoint was harmed"
    )


def _evaluate(evaluate: Evaluate, state: TrainState, step: int) -> Metrics:
    start = time.monotonic()
    metrics = evaluate(state)
    if metrics:
        shown = ", ".join(on_end(metrics))
        seconds = time.monotonic() - start
        logger.info("step %d: %s  (evaluated in %.1f s)", step, shown, seconds)
    return metrics
