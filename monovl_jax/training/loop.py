"""Runs a recipe: its stages in order, resumed by calling `train` again with the same arguments.

Steps are dispatched without waiting for the one before: a thread prepares the next batches, and the metrics of a step are fetched while the
next one runs. A run that is killed and continued on the same machine gives the same losses, to the bit, as one that is not.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from monovl_jax.model import Ops
from monovl_jax.parallel.hosts import in_turn
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import check_rows, parameter_shardings, place_parameters
from monovl_jax.training import checkpoint
from monovl_jax.training.checkpoint import RunError, StageStore, abstract
from monovl_jax.training.lora import adapter_shapes, init_adapters, merged
from monovl_jax.training.metrics import Row, RunLog
from monovl_jax.training.optimizer import Optimizer, make_optimizer
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

Evaluate = Callable[[str, Any, Tree], Any]
"""(stage name, graphdef, parameters of the whole model) -> JSON value or None, kept in `done.json`."""

Records = dict[str, dict[str, Any]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and the mend."""


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


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose metrics are still on the device. waited: the prefetcher's clock when it was dispatched."""

    step: int
    metrics: dict[str, jax.Array]
    waited: float
    logged: bool


class _Clock:
    """Training time of a stage over all its processes, and the time since the last row."""

    def __init__(self, before: float):
        self._before, self._began = before, time.monotonic()
        self._row, self._row_waited, self._tokens = self._began, 0.0, 0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def lap(self, waited: float) -> tuple[float, float]:
        """(tokens per second, share of time waited) since the last lap."""
        now = time.monotonic()
        span = max(now - self._row, 1e-9)
        result = self._tokens / span, min(1.0, (waited - self._row_waited) / span)
        self._row, self._row_waited, self._tokens = now, waited, 0
        return result


@dataclasses.dataclass
class _Run:
    """What `train` was told, and the parameters between stages (kept here alone, so that a stage can let go of them)."""

    recipe: Recipe
    run_dir: Path
    make_batches: MakeBatches
    evaluate: Evaluate | None
    initial: Initial | None
    ops: Ops
    frozen_dtype: Any
    mesh: Mesh
    nll: Nll
    checkpoint_every: int
    keep: int
    log_every: int
    asynchronous: bool | None
    parameters: Tree | None = None

    def __post_init__(self) -> None:
        self.structure = model_structure(self.recipe.model)
        self.shardings = parameter_shardings(self.structure.shapes, self.mesh)

    def store(self, stage: Stage) -> StageStore:
        return StageStore(self.run_dir, stage.name, self.keep, self.asynchronous)

    def reached(self) -> dict[str, int]:
        """Steps done per stage, as the checkpoints on disk say."""
        done = {}
        for stage in self.recipe.stages:
            with self.store(stage) as store:
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

    def begin(self, stage: Stage, store: StageStore, optimizer: Optimizer) -> tuple[Tree, Any, Tree, dict[str, Any]]:
        """(trainable, opt_state, frozen, meta) to go on from: the last complete checkpoint, or the start of the stage."""
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
            return trainable, opt_state, frozen, meta
        trainable, frozen = self.split(self.starting_parameters(stage), chosen)
        if stage.lora:
            trainable |= jax.device_put(
                init_adapters(self.structure.shapes, stage.lora, self.recipe.seed), parameter_shardings(added, mesh)
            )
        opt_state = jax.jit(optimizer.transform.init, out_shardings=states)(trainable)
        store.save_base(frozen)
        return trainable, opt_state, frozen, {"step": 0, "position": 0, "seconds": 0.0}

    def train_stage(self, stage: Stage, store: StageStore, log: RunLog | None) -> None:
        """Trains a stage to its end, writes `final`, and leaves the parameters in `self.parameters`."""
        optimizer = make_optimizer(stage)
        trainable, opt_state, frozen, meta = self.begin(stage, store, optimizer)
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
        )
        done, position = int(meta["step"]), int(meta["position"])
        if log is not None:
            log.begin_stage(stage.name, stage.steps, done)
        clock = _Clock(float(meta["seconds"]))
        batches = Prefetcher(self.make_batches(stage, position), lambda batch: place_batch(batch, self.mesh, stage.accumulation))
        pending: _Pending | None = None
        last = float("nan")
        try:
            for number in range(done + 1, stage.steps + 1):
                try:
                    batch = batches.next()
                except StopIteration:
                    raise TrainingError(
                        f"stage {stage.name!r}: the data ended after {number - 1} of {stage.steps} steps; make_batches must repeat it"
                    ) from None
                position += 1
                trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch)
                del batch
                if pending is not None:
                    last = self._settle(pending, stage, clock, log)
                pending = _Pending(number, metrics, batches.waited, number % self.log_every == 0 or number == stage.steps)
                if number % self.checkpoint_every == 0 and number < stage.steps:
                    # The rows up to here come first: a log has every step that a checkpoint has.
                    last, pending = self._settle(pending, stage, clock, log), None
                    store.save(number, trainable, opt_state, {"step": number, "position": position, "seconds": clock.seconds})
            if pending is not None:
                last = self._settle(pending, stage, clock, log)
        finally:
            batches.close()
            if log is not None:
                log.end_stage()
        del opt_state
        self.parameters = merge_trees(*merged(trainable, frozen, stage.lora))
        store.save_final(self.parameters, {"steps": stage.steps, "position": position, "seconds": clock.seconds, "loss": last})

    def _settle(self, pending: _Pending, stage: Stage, clock: _Clock, log: RunLog | None) -> float:
        """Waits for a dispatched step, writes its row and returns its loss. Raises TrainingError when the loss is not finite."""
        got: dict[str, Any] = jax.device_get(pending.metrics)
        loss, norm = float(got["loss"]), float(got["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"stage {stage.name!r}, step {pending.step}: loss {loss}, gradient norm {norm}. The checkpoints before it are good; "
                f"look at batch {pending.step - 1}, or start a new run with a lower learning rate (now {stage.learning_rate})"
            )
        clock.count(int(got["tokens"]))
        if pending.logged and log is not None:
            rate, share = clock.lap(pending.waited)
            row: Row = {
                "stage": stage.name,
                "step": pending.step,
                "loss": loss,
                "lr": float(got["learning_rate"]),
                "grad_norm": norm,
                "part_losses": [float(x) for x in got["part_losses"]],
                "supervised": int(got["supervised"]),
                "tokens": int(got["tokens"]),
                "tokens_per_second": rate,
                "data_wait": share,
                "seconds": clock.seconds,
                "time": time.time(),
            }
            log.write(row)
        return loss

    def finish_stage(self, stage: Stage, store: StageStore, log: RunLog | None) -> dict[str, Any]:
        """Evaluates a trained stage and marks it as done; rerun from `final` when a kill came in between."""
        store.drop_steps()
        record = store.trained()
        if self.evaluate is not None:
            if log is not None:
                log.say(f"{stage.name}: evaluating ...")
            if self.parameters is None:
                self.parameters = self.load_final(store)
            began = time.monotonic()
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
    run_dir: str | Path,
    make_batches: MakeBatches,
    *,
    evaluate: Evaluate | None = None,
    initial: Initial | None = None,
    ops: Ops | None = None,
    frozen_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    nll: Nll = next_token_nll,
    identity: Mapping[str, Any] | None = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    log_every: int = 1,
    progress: bool = True,
    tensorboard: bool = True,
    asynchronous: bool | None = None,
) -> Records:
    """Trains every stage of a recipe, or what is left of it.

    Call it again with the same arguments to continue: finished stages are skipped, the current one goes on at its last complete checkpoint
    and data position. Layout of `run_dir`: `training.checkpoint`; read the result with `load_run`.

    Args:
      make_batches: the data of a stage from a position on; see `MakeBatches`.
      evaluate: called at the end of each stage; see `Evaluate`. A stage killed while evaluating evaluates again.
      initial: makes the nested dict of parameters to start from; by default random ones of `recipe.seed`. Not called on resume.
      ops: how the model computes (compute dtype, remat, kernels).
      frozen_dtype: of leaves that a stage does not train; bfloat16 on a pod. What a later stage trains starts from the rounded value.
      mesh: all devices on the axis `data` by default.
      nll: the objective; see `training.step.Nll`.
      identity: what else decides the numbers (fingerprints of data, of initial weights), JSON values; another one, another experiment.
      checkpoint_every: steps between checkpoints. keep: how many of them stay. log_every: steps between rows.
      progress, tensorboard: show the progress line; write event files. asynchronous: see `StageStore`.

    Returns {stage: record} as in `done.json`: steps, position, seconds, loss, and evaluation, evaluation_seconds when there is a callback.

    Raises, before anything compiles: RecipeError (a trainable regex that matches nothing, a bad interval), RunError (a directory of
    another experiment, one in use), MeshError (parameters or rows that the mesh cannot divide). While training: TrainingError (a loss that
    is not finite, data that ends), and whatever `make_batches` raises.
    """
    ops = Ops() if ops is None else ops
    for name, value in (("checkpoint_every", checkpoint_every), ("keep", keep), ("log_every", log_every)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; it must be at least 1")
    for stage in recipe.stages:
        recipe.trainable_paths(stage)
    mesh = make_mesh() if mesh is None else mesh
    check_mesh(recipe, mesh)
    run_dir = Path(run_dir)
    run = _Run(
        recipe, run_dir, make_batches, evaluate, initial, ops, frozen_dtype, mesh, nll, checkpoint_every, keep, log_every, asynchronous
    )
    numbers = {"dtype": jnp.dtype(ops.dtype).name, "frozen_dtype": jnp.dtype(frozen_dtype).name, **(identity or {})}
    wanted = checkpoint.experiment(recipe, numbers)
    in_turn(lambda: checkpoint.claim_run(run_dir, wanted))
    with checkpoint.run_lock(run_dir):
        return _train(run, progress, tensorboard)


def _train(run: _Run, progress: bool, tensorboard: bool) -> Records:
    reached, records, starts = run.reached(), {}, {}
    for index, stage in enumerate(run.recipe.stages):
        starts[stage.name] = sum(earlier.steps for earlier in run.recipe.stages[:index])
    log = RunLog(run.run_dir, reached, starts, progress, tensorboard) if jax.process_index() == 0 else None
    try:
        for stage in run.recipe.stages:
            with run.store(stage) as store:
                record = store.record()
                if record is None:
                    if not store.has_final():
                        run.train_stage(stage, store, log)
                    record = run.finish_stage(stage, store, log)
                else:
                    run.parameters = None
                    if log is not None:
                        log.say(f"{stage.name}: done before")
                records[stage.name] = record
    finally:
        if log is not None:
            log.__exit__(None, None, None)
    return records


__all__ = ["Evaluate", "MakeBatches", "Prefetcher", "RunError", "TrainingError", "train"]
