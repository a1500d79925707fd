"""The loop that pretraining, linear evaluation and fine-tuning share.

It is given an opened run and a function that evaluates; it restores, compiles once,
feeds, reports, saves and ends the run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn

import jax

from supcon_jax import hosts, parallel, storage
from supcon_jax.checkpoint import Checkpointer, saved_steps
from supcon_jax.logs import add_log_file, format_duration
from supcon_jax.metrics import best_metric, on_end
from supcon_jax.profiling import parse_window, traced
from supcon_jax.run import health, memory, report
from supcon_jax.run.batches import build_train_batches
from supcon_jax.run.goodput import Goodput, Meter
from supcon_jax.run.health import Health
from supcon_jax.run.opening import Run
from supcon_jax.run.plan import Plan, Step
from supcon_jax.run.stop import Stopped, StopRequests, Unwritable, restart_command
from supcon_jax.run.workdir import before_save, leave
from supcon_jax.steps.state import TrainState
from supcon_jax.writers import MetricWriter, read_metrics

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
DeviceMetrics = dict[str, jax.Array]
PyTree = Any
Evaluate = Callable[[TrainState], Metrics]
Work = Callable[[Checkpointer, StopRequests], Metrics]
# Saves in a row that may be refused because the state is not well.
PATIENCE = 3


def train(
    run: Run,
    *,
    evaluate: Evaluate,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    stop: StopRequests | None = None,
) -> dict[str, Any]:
    """Trains a run to its last step, from its newest checkpoint if it has one.

    It always evaluates and saves at the last step. The host is one step ahead: it waits
    for a step, and fetches its metrics, after it has dispatched the next one, so the
    device never waits; batches are on their way to it two steps ahead.

    Args:
      run: see `opening.open_run`.
      evaluate: metrics of a state.
      on_log: called with the metrics of every progress line.
      stop: entered already; None: the loop listens for signals by itself.

    Returns:
      The metrics of the final line.

    Raises:
      FloatingPointError: the run is not well (config.health); what was saved is whole.
      Stopped: a signal asked for it; the state is saved.
      Unwritable: the disk is full or failed; what was saved is whole.
      ValueError: the step does not fit into memory.
    """
    return run_to_end(
        run,
        lambda checkpointer, stop: _Training(
            run, checkpointer, evaluate, on_log, stop
        ).run(),
        stop=stop,
    )


def run_to_end(run: Run, work: Work, *, stop: StopRequests | None) -> dict[str, Any]:
    """Does a run's work, unless it is done, with all that has to be around it.

    That is its log, its checkpoints, words for what goes wrong, and the lines of its end.

    Args:
      run: see `opening.open_run`.
      work: `(checkpointer, stop) -> final metrics`; it saves, and writes the final line.
      stop: entered already; None: this function listens for signals by itself.

    Returns:
      The metrics of the final line.

    Raises:
      Exception: see `train`.
    """
    if run.finished is not None:
        logger.info("this run is complete; another --workdir starts a new one")
        if not saved_steps(run.workdir):
            logger.warning(
                "warning: its checkpoints are gone, so nothing can be evaluated or "
                "continued from it; another --workdir trains it again"
            )
        try:
            return report.report_end(run, run.finished)
        finally:
            leave(run.workdir)
    try:
        return _work_and_close(run, work, stop)
    except OSError as error:
        raise Unwritable(error.errno, error.strerror, error.filename) from error


def _work_and_close(run: Run, work: Work, stop: StopRequests | None) -> Metrics:
    """`run_to_end` between the opening of log and checkpoints and their end."""
    log_file = add_log_file(run.folder)
    checkpointer = Checkpointer(run.workdir, keep=run.config.keep_checkpoints)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(hosts.Watchdog(run.config.hosts.watchdog_minutes))
            stack.enter_context(memory.explained(run.plan))
            stop = stop or stack.enter_context(StopRequests())
            final = work(checkpointer, stop)
        # Before the log is closed and the last small files go to the bucket.
        return report.report_end(run, final)
    except jax.errors.JaxRuntimeError as error:
        hosts.check_peers(error)  # before the save under way waits for a dead one
        raise
    except Stopped:
        checkpointer.wait()
        step = checkpointer.latest_step()
        kept = "nothing was saved yet" if step is None else f"step {step} is saved"
        message = f"stopped; {kept}; the same command goes on: {restart_command()}"
        logger.info("%s", message)
        raise Stopped(message) from None
    finally:
        # Also after an interrupt: the save that is under way becomes whole.
        with contextlib.ExitStack() as stack:
            stack.callback(leave, run.workdir)
            stack.callback(log_file.close)
            stack.callback(logging.getLogger("supcon_jax").removeHandler, log_file)
            checkpointer.close()


class _Training:
    """One run from its newest checkpoint to its end, or to a stop."""

    def __init__(
        self,
        run: Run,
        checkpointer: Checkpointer,
        evaluate: Evaluate,
        on_log: Callable[[int, Metrics], None],
        stop: StopRequests,
    ):
        self._run, self._plan, self._config = run, run.plan, run.config
        self._checkpointer, self._evaluate_state = checkpointer, evaluate
        self._on_log, self._stop = on_log, stop
        self._refused = 0  # saves in a row
        self._skipped = 0  # updates in a row
        self._checked = 0  # the last step that was looked at
        self._loss = math.nan  # of the last update that was kept

    def run(self) -> Metrics:
        """Everything, in order; returns the metrics of the final line."""
        plan, config = self._plan, self._config
        state, saved = restore_or_init(
            self._checkpointer, plan, self._run.initial_encoder
        )
        start_step = int(state.step)
        with self._stop.interruptible():
            report.log_start(self._run, state)
            host_batches = build_train_batches(
                config, self._run.train_source, self._run.sampler, start_step=start_step
            )
            host_batches = report.measure_input(host_batches, config.batch_size)
            batches = parallel.prefetch_to_devices(host_batches, plan.mesh)
            # The first batch is on its way while the step is compiled.
            first_batch = next(batches)
        self._earlier = read_metrics(self._run.workdir)
        self._goodput = Goodput.continued(self._earlier, start_step=start_step)
        hosts.beat("compiling", patience=6)
        with self._goodput.spent("compile"):
            start = time.monotonic()
            compiled = self._stop.wait_for(plan.lower().compile)
            logger.info("compiled train_step in %.1f s", time.monotonic() - start)
        memory.check_memory(plan, compiled)
        self._writer = MetricWriter(
            self._run.folder,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            start_step=start_step,
            writers=config.writers,
            project=config.project,
            config=config.to_dict(),
        )
        self._goodput.training_starts()
        self._reference = health.measure(state.params, state.batch_stats, math.nan)
        if saved.get("health"):
            self._reference = Health(**saved["health"])
        self._loss = self._reference.loss
        self._told = saved.get("told", {})
        self._meter = Meter(start_step)
        batches = self._timed(itertools.chain([first_batch], batches))
        steps = run_steps(
            functools.partial(compiled, plan.seed_on_devices()),
            state,
            batches,
            self._run.frozen,
            first=start_step + 1,
            last=plan.total_steps,
        )
        window = parse_window(config.profile_steps)
        if window and window.first > plan.total_steps:
            logger.warning(
                "warning: profile_steps=%s begins after the last step, %d "
                "(--config.profile_steps)",
                config.profile_steps,
                plan.total_steps,
            )
        elif window:
            folder = self._run.folder / "profile"
            shown = storage.shown(storage.join(self._run.workdir, "profile"))
            steps = traced(steps, window, folder, start_step=start_step, shown=shown)
        with contextlib.closing(self._writer), contextlib.closing(steps):
            return self._train(steps, state, start_step)

    def _train(
        self,
        steps: Iterator[tuple[int, TrainState, DeviceMetrics]],
        state: TrainState,
        start_step: int,
    ) -> Metrics:
        config, total_steps = self._config, self._plan.total_steps
        before: DeviceMetrics = {}
        pending, last = False, {}
        self._evaluate_what_was_cut_off(state, start_step)
        if start_step == total_steps:
            # It ended between its last save and its final line; its last step was told.
            last = self._told
        for number, state, device_metrics in steps:
            # Of the step before, which is done; this one is on the device.
            if before:
                self._check_step(number - 1, before)
                if pending:
                    last = self._log(number - 1, before)
            first, final = number == start_step + 1, number == total_steps
            pending = number % config.log_every == 0 or first or final
            before = device_metrics
            eval_due, save_due = (
                every > 0 and number % every == 0 and not final
                for every in (config.eval_every, config.checkpoint_every)
            )
            stop_due = self._stop.due()
            if eval_due or save_due or stop_due:
                self._check_step(number, device_metrics)
                with self._meter.pause():
                    metrics: Metrics = {}
                    if eval_due and not stop_due:
                        metrics, stop_due = self._evaluate(state, number)
                    if save_due or stop_due:
                        told = self._log(number, device_metrics) if final else None
                        self._save(state, number, metrics, told=told)
                if stop_due:
                    if pending and not final:  # its line is that of a run that goes on
                        self._log(number, device_metrics)
                    raise Stopped
        if before:
            self._check_step(total_steps, before)
            last = self._log(total_steps, before)
        metrics, stopped = self._evaluate(state, total_steps)
        if self._checkpointer.latest_step() != total_steps:
            self._save(state, total_steps, metrics, told=last)
        self._checkpointer.wait()
        if stopped:  # it is evaluated again when the run goes on
            raise Stopped
        wall_s = self._writer.wall_s()
        final_metrics = last | metrics | self._goodput.metrics(wall_s)
        self._writer.write(total_steps, final_metrics, final=True)
        logger.info(
            "finished %d steps in %s; %.0f %% of the whole time in steps",
            total_steps,
            format_duration(wall_s),
            100 * final_metrics["goodput/share"],
        )
        return final_metrics

    def _evaluate_what_was_cut_off(self, state: TrainState, step: int) -> None:
        """A signal in, or just before, an evaluation saves the state and leaves that out."""
        every = self._config.eval_every
        if not step or not every or step % every or step == self._plan.total_steps:
            return
        if any(r["step"] == step and best_metric(r) for r in self._earlier):
            return
        with self._meter.pause():
            metrics, stopped = self._evaluate(state, step)
        self._checkpointer.measured(step, metrics)
        if stopped:
            raise Stopped

    def _timed(self, batches: Iterator[PyTree]) -> Iterator[PyTree]:
        while True:
            with self._goodput.spent("input"):
                batch = next(batches)
            yield batch

    def _log(self, at: int, device_metrics: DeviceMetrics) -> Metrics:
        metrics = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
        metrics["train/images_per_sec"] = self._config.batch_size * self._meter.read(at)
        total_steps = self._plan.total_steps
        if at < total_steps:
            goodput = self._goodput.metrics(self._writer.wall_s())
            self._writer.write(at, metrics | goodput)
        eta_s = self._meter.eta_s(total_steps - at, self._config.eval_every)
        self._writer.log_progress(at, metrics, eta_s)
        self._on_log(at, metrics)
        return metrics

    def _check_step(self, number: int, device_metrics: DeviceMetrics) -> None:
        """Stops where a step was not finite: its update was not kept."""
        if number == self._checked:  # it was looked at before it was saved
            return
        self._checked = number
        loss, norm, skipped = (
            float(device_metrics[name])
            for name in ("train/loss", "optim/gradient_norm", "optim/skipped")
        )
        if not skipped:
            self._loss = loss
        if math.isnan(self._reference.loss):
            self._reference = self._reference._replace(loss=loss)
        if not skipped:
            self._skipped = 0
            return
        self._skipped += 1
        options = self._config.health
        what = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {number}"
        if options.on_nonfinite == "skip" and self._skipped <= options.max_skipped:
            logger.warning("warning: %s; its update is left out", what)
            return
        self._give_up(what)

    def _save(
        self,
        state: TrainState,
        step: int,
        metrics: Metrics,
        *,
        told: Metrics | None = None,
    ) -> None:
        """Saves a state that is well; what was saved before stays where it is not.

        That of the last step has what was `told` of it: the final line is not written yet.
        """
        if step == self._checkpointer.latest_step():
            return
        hosts.beat(f"saving step {step}")
        before_save(self._run.workdir)
        with self._goodput.spent("save"):
            now = health.measure(state.params, state.batch_stats, self._loss)
            reason = health.judge(
                now,
                self._reference,
                loss_rise=self._config.health.loss_rise,
                norm_growth=self._config.health.norm_growth,
            )
            if reason is None:
                self._refused, self._reference = 0, now
                self._checkpointer.save(
                    state, step, metrics, health=now._asdict(), told=told
                )
                return
        self._refused += 1
        if told is not None or not now.finite or self._refused > PATIENCE:
            self._give_up(f"the state of step {step} is not saved: {reason}")
        logger.warning(
            "warning: the state of step %d is not saved: %s (--config.health.loss_rise, "
            "--config.health.norm_growth)",
            step,
            reason,
        )

    def _give_up(self, what: str) -> NoReturn:
        step = self._checkpointer.latest_step()
        kept = "nothing is saved" if step is None else f"step {step} is saved, and well"
        raise FloatingPointError(
            f"{what}; {kept}; likely causes: a learning rate that is too high "
            "(--config.optimizer.learning_rate), a warm-up that is too short "
            "(--config.optimizer.warmup_epochs), a very low temperature "
            "(--config.loss.temperature)"
        )

    def _evaluate(self, state: TrainState, step: int) -> tuple[Metrics, bool]:
        """Metrics of a state, and whether a signal cut the evaluation off."""
        start = time.monotonic()
        try:
            with self._goodput.spent("eval"), self._stop.interruptible():
                metrics = self._evaluate_state(state)
        except Stopped:
            return {}, True
        seconds = time.monotonic() - start
        self._meter.eval_s = seconds
        if metrics:
            shown = ", ".join(on_end(metrics, self._config.eval_metric))
            logger.info("step %d: %s  (evaluated in %.1f s)", step, shown, seconds)
            if step < self._plan.total_steps:
                self._writer.write(step, metrics)
        return metrics, False


def run_steps(
    step: Step,
    state: TrainState,
    batches: Iterator[dict[str, jax.Array]],
    frozen: tuple[PyTree, ...] = (),
    *,
    first: int = 1,
    last: int,
) -> Generator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Each step's number, state and metrics, which the device may still compute.

    One step ahead keeps the device busy; more would pile up batches on it.

    Args:
      step: `plan.lower().compile()` with the seed, `(state, batch, *frozen) -> ...`.
      state: before the first step; given away.
      batches: on the devices.
      frozen: what the step reads and does not train.
      first, last: numbers of the steps.
    """
    metrics: dict[str, jax.Array] = {}
    for number in range(first, last + 1):
        before = metrics
        state, metrics = step(state, next(batches), *frozen)
        jax.block_until_ready(before)
        hosts.beat(f"step {number}")
        yield number, state, metrics


def restore_or_init(
    checkpointer: Checkpointer, plan: Plan, initial_encoder: PyTree = None
) -> tuple[TrainState, dict[str, Any]]:
    """The newest whole state and what was saved with it, or a new one and {}; replicated.

    A restored state costs no compilation of `init`. A new one has the `initial_encoder`,
    where there is one.
    """
    replicated = parallel.replicated(plan.mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        plan.abstract_state(),
    )
    found = checkpointer.restore_newest(abstract)
    if found is None:
        # Runs once, and is mostly random numbers: on a CPU, optimising the program takes
        # four times as long as compiling and running it plainly.
        plain = {"xla_backend_optimization_level": 0}
        options = plain if plan.platform == "cpu" else None
        init = jax.jit(plan.init, out_shardings=replicated, compiler_options=options)
        state = init()
        return state.with_encoder(initial_encoder) if initial_encoder else state, {}
    logger.info("resumed at step %d", int(found[0].step))
    return found
