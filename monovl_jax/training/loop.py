"""Runs a recipe: its stages in order, resumed by calling `train` again with the same arguments.

Steps are dispatched without waiting for the one before: a thread prepares the next batches, and the metrics of a step are fetched while the
next one runs. A run that is killed and continued on the same machine gives the same losses, to the bit, as one that is not.

An update whose loss or gradient is not finite is left out inside the step; so many in a row, and the run stops with the batch saved in
`stages/<stage>/not_finite/`. On SIGTERM it saves and raises PreemptedError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from monovl_jax.model import Ops
from monovl_jax.parallel.hosts import in_turn
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import check_rows, parameter_shardings, place_parameters
from monovl_jax.training import checkpoint
from monovl_jax.training.accounting import Clock, Pending, Progress, Settler, TrainingError
from monovl_jax.training.checkpoint import RunError, StageStore, abstract
from monovl_jax.training.devices import compiler_options
from monovl_jax.training.files import AnyPath, place
from monovl_jax.training.flops import step_flops
from monovl_jax.training.guards import Watchdog
from monovl_jax.training.lora import adapter_shapes, init_adapters, merged
from monovl_jax.training.metrics import RunLog
from monovl_jax.training.optimizer import Optimizer, make_optimizer
from monovl_jax.training.preemption import PreemptedError, Preemption
from monovl_jax.training.profiling import Profiler
from monovl_jax.training.stages import Recipe, RecipeError, Stage
from monovl_jax.training.step import Batch, Nll, make_train_step, next_token_nll, optimizer_shardings, place_batch
from monovl_jax.training.trainable import (
    Initial,
    Tree,
    cast,
    check_tree,
    flatten,
    initialise_experts,
    merge_trees,
    model_structure,
    random_parameters,
    split_tree,
    unflatten,
)

MakeBatches = Callable[[Stage, int], Iterator[Batch]]
"""(stage, position) -> batches number `position`, position + 1, ... of the stage, one per step; they must last as long as it.

A batch is a part or a tuple of parts, dicts of host arrays [rows, ...] (this process's rows, `parallel.mesh.row_share`; the loop cuts
micro-batches)."""


@runtime_checkable
class DataState(Protocol):
    """Lets `MakeBatches` begin at a position without going over what lies before it."""

    def state(self, stage: Stage, position: int) -> Any:
        """JSON value, kept in the checkpoint: where the data are before batch number `position`. The same on every process."""
        ...

    def restore(self, stage: Stage, state: Any) -> bool:
        """Called before batches are made again. False when the state is not of these data: the position alone is used."""
        ...


Evaluate = Callable[[str, Any, Tree], Any]
"""(stage name, graphdef, parameters of the whole model) -> JSON value or None, kept in `done.json` or `evaluations.jsonl`.

In the middle of a stage the parameters are the live ones: do not keep them, the next step overwrites them."""

Records = dict[str, dict[str, Any]]


class Prefetcher:
    """Batches on their way to the device, made by a thread at most `ahead` batches ahead. Its errors surface in `next`."""

    def __init__(self, batches: Iterator[Batch], place: Callable[[Batch], Any], ahead: int = 2):
        self._batches, self._place = batches, place
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monovl-prefetch", daemon=True)
        self._thread.start()
        self.waited = 0.0
        """Seconds spent in `next` so far."""

    def _work(self) -> None:
        try:
            for batch in self._batches:
                if not self._put("batch", self._place(batch)):
                    return
            self._put("end", None)
        except BaseException as error:  # handed to the training thread
            self._put("error", error)
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> Any:
        """The next placed batch. Raises StopIteration at the end, or what the thread raised."""
        began = time.monotonic()
        kind, value = self._queue.get()
        self.waited += time.monotonic() - began
        if kind == "error":
            raise value
        if kind == "end":
            raise StopIteration
        return value

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)


@dataclasses.dataclass
class _Run:
    """What `train` was told, and the parameters between stages (kept here alone, so that a stage can let go of them)."""

    recipe: Recipe
    run_dir: AnyPath
    make_batches: MakeBatches
    data_state: DataState | None
    evaluate: Evaluate | None
    initial: Initial | None
    ops: Ops
    frozen_dtype: Any
    mesh: Mesh
    nll: Nll
    checkpoint_every: int
    keep: int
    milestone_every: int | None
    log_every: int
    evaluate_every: int | None
    max_skipped: int
    asynchronous: bool
    options: Mapping[str, Any]
    profiler: Profiler
    preemption: Preemption
    parameters: Tree | None = None
    calls: int = 0

    def __post_init__(self) -> None:
        self.structure = model_structure(self.recipe.model)
        self.shardings = parameter_shardings(self.structure.shapes, self.mesh)

    def store(self, stage: Stage) -> StageStore:
        return StageStore(self.run_dir, stage.name, self.keep, self.asynchronous, self.milestone_every)

    def reached(self) -> dict[str, int]:
        """Steps done per stage, as the checkpoints on disk say."""
        done = {}
        for stage in self.recipe.stages:
            store = self.store(stage)
            done[stage.name] = stage.steps if store.has_final() else store.latest() or 0
        return done

    def starting_parameters(self, stage: Stage) -> Tree:
        """The end of the stage before, or the initial parameters; visual experts copied where the recipe says so."""
        index = self.recipe.stages.index(stage)
        parameters, self.parameters = self.parameters, None
        if parameters is None and index:
            with self.store(self.recipe.stages[index - 1]) as store:
                parameters = self.load_final(store)
        elif parameters is None and self.initial is not None:
            parameters = self.initial()
            check_tree(parameters, self.structure.shapes, "initial parameters")
            parameters = place_parameters(parameters, self.mesh)
        elif parameters is None:
            seed = self.recipe.seed
            parameters = jax.jit(lambda: random_parameters(self.recipe.model, seed), out_shardings=self.shardings)()
        return initialise_experts(parameters) if stage.name == self.recipe.copy_experts_before else parameters

    def load_final(self, store: StageStore) -> Tree:
        return store.restore_final(checkpoint.final_target(store.final, self.recipe.model, self.mesh), self.recipe.model)

    def split(self, parameters: Tree, chosen: frozenset[str]) -> tuple[Tree, Tree]:
        """(trainable float32 masters in buffers of their own, frozen leaves in the frozen dtype). No more than one leaf is there twice."""
        flat, masters, frozen = flatten(parameters), {}, {}
        del parameters
        for path in list(flat):
            leaf = {path: flat.pop(path)}
            if path in chosen:
                masters |= cast(leaf, jnp.float32, copy=True)
            else:
                frozen |= cast(leaf, self.frozen_dtype)
            del leaf
        return unflatten(masters), unflatten(frozen)

    def begin(self, stage: Stage, store: StageStore, optimizer: Optimizer) -> tuple[Tree, Any, Tree, Progress]:
        """(trainable, opt_state, frozen, progress) to go on from: the last complete checkpoint, or the start of the stage."""
        chosen, mesh = self.recipe.trainable_paths(stage), self.mesh
        shapes, places = (split_tree(tree, chosen) for tree in (self.structure.shapes, self.shardings))
        added = adapter_shapes(self.structure.shapes, stage.lora) if stage.lora else {}
        masters = abstract(shapes[0] | added, places[0] | parameter_shardings(added, mesh), jnp.float32)
        states = optimizer_shardings(optimizer, masters, mesh)
        latest = store.latest()
        if latest is not None:
            self.parameters = None
            state = abstract(jax.eval_shape(optimizer.transform.init, masters), states)
            trainable, opt_state, meta = store.restore(latest, masters, state)
            frozen = store.restore_base(abstract(shapes[1], places[1], self.frozen_dtype), self.recipe.model)
            return trainable, opt_state, frozen, Progress.of(meta)
        trainable, frozen = self.split(self.starting_parameters(stage), chosen)
        if stage.lora:
            trainable |= jax.device_put(
                init_adapters(self.structure.shapes, stage.lora, self.recipe.seed), parameter_shardings(added, mesh)
            )
        opt_state = jax.jit(optimizer.transform.init, out_shardings=states)(trainable)
        store.save_base(frozen)
        return trainable, opt_state, frozen, Progress()

    def go_on_with_data(self, stage: Stage, progress: Progress, log: RunLog | None) -> None:
        """Puts the data where the checkpoint has them, or says that what lies before is planned again."""
        if self.data_state is None or not progress.position or self.data_state.restore(stage, progress.data):
            return
        if log is not None:
            why = "holds no state of the data" if progress.data is None else "holds the state of other data"
            log.say(f"{stage.name}: the checkpoint {why}; the order of the {progress.position} batches before is planned again")

    def train_stage(self, stage: Stage, store: StageStore, log: RunLog | None, watchdog: Watchdog) -> None:
        """Trains a stage to its end, writes `final`, and leaves the parameters in `self.parameters`."""
        optimizer = make_optimizer(stage)
        trainable, opt_state, frozen, progress = self.begin(stage, store, optimizer)
        step = make_train_step(
            self.structure.graphdef,
            optimizer,
            self.ops,
            trainable,
            frozen,
            self.mesh,
            accumulation=stage.accumulation,
            nll=self.nll,
            lora=stage.lora,
            compiler_options=self.options,
        )
        done = progress.step
        if log is not None:
            log.begin_stage(stage.name, stage.steps, done)
        self.go_on_with_data(stage, progress, log)
        clock = Clock(progress)
        flops = step_flops(self.recipe.model, frozenset(flatten(trainable)))
        batches = Prefetcher(self.make_batches(stage, progress.position), lambda batch: place_batch(batch, self.mesh, stage.accumulation))
        vision, folder = self.recipe.model.vision, store.folder
        settler = Settler(stage, vision, folder, self.max_skipped, progress, clock, flops, log, watchdog)
        stopping = False
        try:
            for number in range(done + 1, stage.steps + 1):
                try:
                    with watchdog.doing("data", stage.name, number):
                        batch = batches.next()
                except StopIteration:
                    raise TrainingError(
                        f"stage {stage.name!r}: the data ended after {number - 1} of {stage.steps} steps; make_batches must repeat it"
                    ) from None
                self.profiler.before(number, log)
                trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch)
                self.calls += 1
                settler.settle()
                settler.pending = Pending(number, metrics, batch, batches.waited, number % self.log_every == 0 or number == stage.steps)
                del batch, metrics
                stopping = self.preemption.reached(self.calls)
                due = stopping or number % self.checkpoint_every == 0
                if self.profiler.last(number):
                    settler.settle()
                    self.profiler.stop(log)
                if self.evaluate_every and number % self.evaluate_every == 0 and number < stage.steps:
                    settler.settle()
                    with clock.aside(), watchdog.doing("evaluation", stage.name, number):
                        self.evaluate_now(stage, number, merge_trees(*merged(trainable, frozen, stage.lora)), log)
                if due and number < stage.steps:
                    # The rows up to here come first: a log has every step that a checkpoint has.
                    settler.settle()
                    with clock.aside(), watchdog.doing("save", stage.name, number):
                        progress.data = self.data_state.state(stage, progress.position) if self.data_state is not None else None
                        store.save(number, trainable, opt_state, dataclasses.asdict(progress))
                    if log is not None:
                        log.flush()
                    if stopping:
                        break
            settler.settle()
        finally:
            self.profiler.stop(log)
            batches.close()
            if log is not None:
                log.end_stage()
        if stopping and progress.step < stage.steps:
            store.wait()
            raise self.preempted(stage, progress.step)
        del opt_state
        self.parameters = merge_trees(*merged(trainable, frozen, stage.lora))
        with watchdog.doing("save", stage.name, stage.steps):
            record = {"position": progress.position, "seconds": clock.seconds, "loss": progress.loss, "skipped": progress.skipped}
            store.save_final(self.parameters, {"steps": stage.steps, **record})
        if stopping:
            raise self.preempted(stage, stage.steps)

    def preempted(self, stage: Stage, step: int) -> PreemptedError:
        return PreemptedError(f"stopped by SIGTERM; stage {stage.name!r} is saved at step {step}, start the same command again to go on")

    def evaluate_now(self, stage: Stage, step: int, parameters: Tree, log: RunLog | None) -> None:
        """Evaluates in the middle of a stage."""
        assert self.evaluate is not None
        began = time.monotonic()
        result = self.evaluate(stage.name, self.structure.graphdef, parameters)
        if log is not None:
            log.evaluation(stage.name, step, result, time.monotonic() - began)

    def finish_stage(self, stage: Stage, store: StageStore, log: RunLog | None, watchdog: Watchdog) -> dict[str, Any]:
        """Evaluates a trained stage and marks it as done; rerun from `final` when a kill came in between."""
        store.drop_steps()
        record = store.trained()
        if self.evaluate is not None:
            if log is not None:
                log.say(f"{stage.name}: evaluating ...")
            if self.parameters is None:
                self.parameters = self.load_final(store)
            began = time.monotonic()
            with self.preemption.at_once(), watchdog.doing("evaluation", stage.name, stage.steps):
                record["evaluation"] = self.evaluate(stage.name, self.structure.graphdef, self.parameters)
            record["evaluation_seconds"] = time.monotonic() - began
        store.finish(record)
        return record


def check_mesh(recipe: Recipe, mesh: Mesh) -> None:
    """Raises MeshError when the mesh cannot divide the parameters of the model or the rows of a stage."""
    parameter_shardings(model_structure(recipe.model).shapes, mesh)
    for stage in recipe.stages:
        for field, rows in (("batch_size", stage.batch_size), ("text_rows", stage.text_rows)):
            check_rows(rows // stage.accumulation, f"stage {stage.name!r}: {field}", mesh)


def train(
    recipe: Recipe,
    run_dir: str | AnyPath,
    make_batches: MakeBatches,
    *,
    data_state: DataState | None = None,
    evaluate: Evaluate | None = None,
    initial: Initial | None = None,
    ops: Ops | None = None,
    frozen_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    nll: Nll = next_token_nll,
    identity: Mapping[str, Any] | None = None,
    claimed: Callable[[], None] | None = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    milestone_every: int | None = None,
    evaluate_every: int | None = None,
    log_every: int = 1,
    max_skipped: int = 5,
    stall_seconds: float = 300.0,
    profile: tuple[int, int] | None = None,
    xla_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    tensorboard: bool = True,
    asynchronous: bool = True,
) -> Records:
    """Trains every stage of a recipe, or what is left of it.

    Call it again with the same arguments to continue: finished stages are skipped, the current one goes on at its last complete checkpoint
    and data position. Layout of `run_dir`: `training.checkpoint`; read the result with `load_run`.

    Args:
      make_batches: the data of a stage from a position on; see `MakeBatches`.
      data_state: saves with each checkpoint where `make_batches` is, and goes on there; see `DataState`.
      evaluate: called at the end of each stage; see `Evaluate`. A stage killed while evaluating evaluates again.
      initial: makes the nested dict of parameters to start from; by default random ones of `recipe.seed`. Not called on resume.
      ops: how the model computes (compute dtype, remat, kernels).
      frozen_dtype: of leaves that a stage does not train; bfloat16 on a pod. What a later stage trains starts from the rounded value.
      mesh: all devices on the axis `data` by default.
      nll: the objective; see `training.step.Nll`.
      identity: what else decides the numbers (fingerprints of data, of initial weights), JSON values; another one, another experiment.
      claimed: called once `run_dir` belongs to this run and no other process holds it, before anything compiles: writes files of its own.
      checkpoint_every: steps between checkpoints. keep: how many of them stay. milestone_every: those whose step it divides stay for good.
      evaluate_every: steps between calls of `evaluate` in the middle of a stage. log_every: steps between rows.
      max_skipped: so many updates in a row that are not finite stop the run. stall_seconds: a wait that is reported (`guards.Watchdog`).
      profile: (first step, how many) to trace into `run_dir`/profile. xla_options: of the step; by default those of `training.devices`.
      progress, tensorboard: show the progress line; write event files. asynchronous: see `StageStore`.

    Returns {stage: record} as in `done.json`: steps, position, seconds, loss, and evaluation, evaluation_seconds when there is a callback.

    Raises, before anything compiles: RecipeError (a trainable regex that matches nothing, a bad interval), RunError (a directory of
    another experiment, one in use), MeshError (parameters or rows that the mesh cannot divide). While training: TrainingError (losses that
    are not finite, data that ends), DamagedError (a checkpoint that cannot be read back), DiskFullError, PreemptedError (SIGTERM;
    everything is saved), and whatever `make_batches` raises.
    """
    ops = Ops() if ops is None else ops
    intervals = {"checkpoint_every": checkpoint_every, "keep": keep, "log_every": log_every, "max_skipped": max_skipped}
    intervals |= {"milestone_every": milestone_every, "evaluate_every": evaluate_every}
    for name, value in intervals.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}; it must be at least 1")
    if milestone_every and milestone_every % checkpoint_every:
        raise RecipeError(f"milestone_every is {milestone_every}; it must be a multiple of checkpoint_every, {checkpoint_every}")
    if evaluate_every and evaluate is None:
        raise RecipeError(f"evaluate_every is {evaluate_every}, and there is nothing to call; give evaluate")
    for stage in recipe.stages:
        recipe.trainable_paths(stage)
    mesh = make_mesh() if mesh is None else mesh
    check_mesh(recipe, mesh)
    run_dir = place(run_dir)
    run = _Run(
        recipe=recipe,
        run_dir=run_dir,
        make_batches=make_batches,
        data_state=data_state,
        evaluate=evaluate,
        initial=initial,
        ops=ops,
        frozen_dtype=frozen_dtype,
        mesh=mesh,
        nll=nll,
        checkpoint_every=checkpoint_every,
        keep=keep,
        milestone_every=milestone_every,
        log_every=log_every,
        evaluate_every=evaluate_every,
        max_skipped=max_skipped,
        asynchronous=asynchronous,
        options=compiler_options(jax.devices()[0].device_kind) if xla_options is None else xla_options,
        profiler=Profiler(run_dir / "profile", profile),
        preemption=Preemption(),
    )
    numbers = {"dtype": jnp.dtype(ops.dtype).name, "frozen_dtype": jnp.dtype(frozen_dtype).name, **(identity or {})}
    wanted = checkpoint.experiment(recipe, numbers)
    in_turn(lambda: checkpoint.claim_run(run_dir, wanted))
    with checkpoint.run_lock(run_dir):
        if claimed is not None:
            in_turn(claimed)
        return _train(run, progress, tensorboard, stall_seconds)


def _train(run: _Run, progress: bool, tensorboard: bool, stall_seconds: float) -> Records:
    reached, records, starts = run.reached(), {}, {}
    for index, stage in enumerate(run.recipe.stages):
        starts[stage.name] = sum(earlier.steps for earlier in run.recipe.stages[:index])
    first, processes = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(run.run_dir, reached, starts, progress, tensorboard)) if first == 0 else None
        warn = log.event if log is not None else functools.partial(print, file=sys.stderr, flush=True)
        watchdog = stack.enter_context(Watchdog(run.run_dir, warn, stall_seconds, first, processes))
        stack.enter_context(run.preemption.listening())
        for stage in run.recipe.stages:
            with run.store(stage) as store:
                record = store.record()
                if record is None:
                    if not store.has_final():
                        run.train_stage(stage, store, log, watchdog)
                    record = run.finish_stage(stage, store, log, watchdog)
                else:
                    run.parameters = None
                    if log is not None:
                        log.say(f"{stage.name}: done before")
                records[stage.name] = record
    return records


__all__ = ["Evaluate", "MakeBatches", "PreemptedError", "Prefetcher", "RunError", "TrainingError", "train"]
