"""A run: its plan, its data and its folder, opened and checked."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import hosts, parallel, storage
from supcon_jax.checkpoint import digest, saved_steps
from supcon_jax.config.check import flatten
from supcon_jax.data.identity import identify
from supcon_jax.data.pipeline import on_host
from supcon_jax.data.sampler import Sampler
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.run.batches import build_sampler, check_hosts, create_predictor
from supcon_jax.run.plan import Plan, create_plan
from supcon_jax.run.splits import check_positives, count_classes, open_sources
from supcon_jax.run.workdir import (
    check_shared,
    finished_metrics,
    local_folder,
    open_workdir,
    read_facts,
)
from supcon_jax.storage import epaths
from supcon_jax.writers import check_installed

logger = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A plan with its data and its folder, both checked and opened.

    Attributes:
      plan: what is computed.
      workdir: absolute path, or URL of a bucket; holds config.json.
      train_source, eval_source: the two splits.
      sampler: which training images a step sees.
      finished: the final metrics, where the run is complete already.
      frozen: arrays that every step reads and none changes, on every device.
      initial_encoder: variables of another run that training starts from, on every
        device; None: from the seed. Given away with the state of step 0.
    """

    plan: Plan
    workdir: pathlib.Path
    train_source: Source
    eval_source: Source
    sampler: Sampler
    finished: dict[str, Any] | None
    frozen: tuple[PyTree, ...] = ()
    initial_encoder: PyTree = None

    @property
    def config(self) -> ConfigDict:
        """The plan's."""
        return self.plan.config

    @property
    def mesh(self) -> Mesh:
        """The plan's."""
        return self.plan.mesh

    @property
    def folder(self) -> pathlib.Path:
        """Where its small files are written: the workdir, or the local copy of it."""
        return local_folder(self.workdir)

    @property
    def skipped(self) -> dict[str, str]:
        """Images of both splits that could not be decoded so far, and why."""
        return {
            **self.train_source.unreadable.reasons,
            **self.eval_source.unreadable.reasons,
        }


def plan_for(config: ConfigDict, mesh: Mesh, train: Source) -> Plan:
    """What a config computes on a training split."""
    return create_plan(
        config,
        mesh,
        num_classes=train.num_classes,
        num_examples=train.num_examples,
        whole_images=not on_host(train),
        label_classes=len(sets.class_names) if (sets := train.label_sets) else 0,
        class_counts=count_classes(config, train),
    )


def open_run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    load_frozen: Callable[[Plan], tuple[PyTree, ...]] = lambda plan: (),
    load_initial: Callable[[Plan], PyTree] = lambda plan: None,
) -> Run:
    """Opens data and workdir of a checked config; refuses before it writes anything.

    Args:
      config: a checked config.
      workdir: folder of the run.
      load_frozen: what the step reads and does not train, on every device of a plan.
      load_initial: the encoder that training starts from, on every device; None: a new one.

    Raises:
      ValueError: data, batch size or workdir cannot be used, in one line.
    """
    mesh = prepare(config, workdir)
    check_hosts(config)
    train_source, eval_source = open_sources(config)
    check_positives(config, train_source)
    sampler = build_sampler(config, train_source)
    plan = plan_for(config, mesh, train_source)
    data = {"train": identify(train_source), "evaluation": identify(eval_source)}
    # What one process alone cannot use ends all of them here, before they compute together.
    hosts.agree(
        {split: json.dumps(facts) for split, facts in data.items()}
        | {"number of devices": str(jax.local_device_count())},
        on="data and devices",
    )
    frozen, initial_encoder = load_frozen(plan), None
    # A run that goes on has its encoder, whatever has become of these weights since.
    if not (config.encoder.init_from and saved_steps(workdir)):
        initial_encoder = load_initial(plan)
    given = frozen if initial_encoder is None else (initial_encoder,)
    path = open_workdir(
        config,
        workdir,
        frozen=digest(given) if given else "",
        data=data,
    )
    _note_classes(path, train_source)
    logger.info("workdir %s", storage.shown(path))
    return Run(
        plan=plan,
        workdir=path,
        train_source=train_source,
        eval_source=eval_source,
        sampler=sampler,
        finished=finished_metrics(path),
        frozen=frozen,
        initial_encoder=initial_encoder,
    )


def _note_classes(path: pathlib.Path, train: Source) -> None:
    """Adds the names of the classes to run.json: an evaluation is held to them.

    They stand beside the digests, which have to be those of a run before there were names.
    """
    if jax.process_index() != 0 or not train.class_names:
        return
    facts = read_facts(path) | {
        "class_names": [str(name) for name in train.class_names]
    }
    try:
        content = json.dumps(facts, indent=2) + "\n"
        storage.write(storage.join(path, "run.json"), content.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write to workdir {path}: {error.strerror} (--workdir)"
        ) from None


def prepare(config: ConfigDict, workdir: str | pathlib.Path) -> Mesh:
    """What can be checked before data are opened, which may take minutes; the devices.

    Raises:
      ValueError: processes that differ, or a workdir, tracker or batch size that cannot be
        used.
    """
    agree_on_config(config)
    check_shared(workdir)
    check_installed(config.writers)
    setup_compilation_cache(enabled=config.compilation_cache)
    mesh = parallel.create_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    return mesh


def agree_on_config(config: ConfigDict) -> None:
    """Refuses processes of one job that run another config or another code.

    Where the data lie may differ from host to host; what is in them is compared later.

    Raises:
      ValueError: naming the process, the key and both values.
    """
    elsewhere = ("data.dir", "data.root")
    flat = flatten(config.to_dict())
    facts = {key: repr(flat[key]) for key in flat if key not in elsewhere}
    code = {"the code": hosts.code_version()} if hosts.count() > 1 else {}
    hosts.agree(facts | code, on="config and code")


def setup_compilation_cache(*, enabled: bool) -> None:
    """Keeps compiled programs in the user's cache folder, so that a rerun starts fast.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder, which may be in a bucket.

    Raises:
      ValueError: what a bucket needs is not installed.
    """
    jax.config.update("jax_enable_compilation_cache", enabled)
    if not enabled:
        return
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        try:
            home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            folder = home.expanduser() / "supcon_jax" / "jax"
        except RuntimeError:  # nobody's home is known: compile every time
            jax.config.update("jax_enable_compilation_cache", False)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    epaths.as_path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    # By default JAX keeps only what took over a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def build_predictor(run: Run, encoder: nn.Module, head: nn.Module | None) -> Predictor:
    """What runs a frozen model over the splits of a run."""
    return create_predictor(run.config, run.mesh, encoder, head)
