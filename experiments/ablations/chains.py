"""Arms as chains of stages, trained once per content.

A chain is stage 0 (text alone, without experts), then the stages of an arm. Each link has a key over all that decides its numbers: the
link before it, model, stage, learning rate, seed, data. What a link leaves (parameters, scores) is kept in a folder of that name, so that
two arms, or two experiments, that begin alike share the beginning.

    S0 -> S1.1 -> S1.2 -> S1.3 -> S2          EViP
                     \\--> S1.3' -> S2         the same with attention frozen in S1.3: S0, S1.1, S1.2 are not trained again
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from experiments.ablations.setting import Setting
from monovl_jax.config import Experts, ModelConfig
from monovl_jax.demo.recipe import TEXT, initial_parameters
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import place_parameters, replicated
from monovl_jax.training.devices import compiler_options
from monovl_jax.training.files import write_json
from monovl_jax.training.loop import Prefetcher
from monovl_jax.training.optimizer import Optimizer, learning_rate_schedule, make_optimizer
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.step import make_train_step, optimizer_shardings, place_batch
from monovl_jax.training.trainable import Tree, cast, flatten, initialise_experts, merge_trees, model_structure, split_tree, unflatten

Initialise = Literal["copy", "random", "zero output"]

VISION = (r"^vision/", r"^projector/")
VISUAL = (*VISION, r"/visual/")
ATTENTION = (r"^decoder/blocks/attention/text/",)
EVERYTHING = (r".*",)
POINTS = 4
"""Places of a stage where it is scored, evenly spaced, the last at its end."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of an arm, independent of the size of the run.

    units: how long, in `Size.steps`. text_share: rows of text alone beside those with
    pictures, as a share of all rows.
    """

    name: str
    trainable: tuple[str, ...]
    lessons: tuple[tuple[str, float], ...]
    units: float
    schedule: Literal["constant", "cosine"] = "cosine"
    text_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared. text: what a reader is told about it. initialise: how visual experts begin."""

    name: str
    text: str
    experts: Experts
    steps: tuple[Step, ...]
    initialise: Initialise = "copy"
    attention_output: bool = True


class Rate(NamedTuple):
    """Optimizer state that holds the learning rate of the next update: float32[]."""

    rate: jax.Array


def optimizer_with_rate(stage: Stage) -> Optimizer:
    """`make_optimizer` with the learning rate as a number of the state (`with_rate`) instead of a schedule: one program serves every rate,
    schedule and number of steps. A state without a rate learns nothing: it begins at 0.
    """
    unit = make_optimizer(dataclasses.replace(stage, learning_rate=1.0, schedule="constant", warmup_steps=0))

    def init(params: Any) -> Rate:
        del params
        return Rate(jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u: state.rate * u, updates), state

    return Optimizer(optax.chain(unit.transform, optax.GradientTransformation(init, update)), unit.schedule)


def with_rate(state: Any, rate: Any) -> Any:
    """The state of `optimizer_with_rate` with the learning rate of the next update."""
    return (*state[:-1], Rate(rate))


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a file for this process; gives whether it got it. A process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@dataclasses.dataclass(frozen=True)
class Link:
    """One stage of one run. rate: of the stage itself. key: a digest of everything that decides its numbers."""

    key: str
    stage: Stage
    config: ModelConfig
    rate: float
    seed: int
    initialise: Initialise | None


@functools.lru_cache(maxsize=8)
def _fresh(config: ModelConfig, seed: int) -> Tree:
    """Untrained parameters."""
    any_stage = Stage("any", EVERYTHING, 1, 1, 1.0, 2, 0, {"any": 1.0})
    return initial_parameters(Recipe("ablation", config, (any_stage,), seed=seed))


class Lab:
    """Trains links and keeps what they leave, in `folder`. Two processes with one folder share the work."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting, self.folder = setting, folder
        self._mesh = make_mesh()
        self._compiled: dict[Any, Any] = {}

    # ---- what to train -------------------------------------------------------------------------------------------------------------

    def stage(self, step: Step, seed: int) -> Stage:
        """A step of an arm at this size. Its learning rate is that of the `Link`."""
        size = self.setting.size
        text_rows = round(step.text_share * size.rows)
        steps = max(1, round(step.units * size.steps))
        return Stage(
            name=step.name,
            trainable=step.trainable,
            steps=steps,
            batch_size=size.rows - text_rows,
            learning_rate=1.0,
            sequence_length=size.row_tokens,
            tiles_per_row=size.row_tiles,
            mixture=dict(step.lessons),
            schedule=step.schedule,
            warmup_steps=min(20, max(1, steps // 5)),
            final_fraction=0.05,
            b2=0.98,
            text_rows=text_rows,
            text_length=size.row_tokens if text_rows else 0,
            text_mixture={"text_mix": 1.0} if text_rows else {},
            seed=seed,
        )

    def text_stage(self, seed: int) -> Stage:
        """Stage 0: the language model that every arm starts from."""
        size = self.setting.size
        return dataclasses.replace(
            self.stage(Step("S0", TEXT, (("language", 1.0),), 1.0), seed),
            steps=size.text_steps,
            warmup_steps=min(30, size.text_steps),
            batch_size=2 * size.rows,
            sequence_length=128,
            tiles_per_row=0,
        )

    def chain(self, arm: Arm, rate: float, seed: int) -> list[Link]:
        """Stage 0 and the stages of an arm, each with its key."""
        size, setting = self.setting.size, self.setting
        plain, config = setting.config("none"), setting.config(arm.experts, arm.attention_output)
        links = [self._link("", self.text_stage(seed), plain, size.text_rate, seed, None)]
        for number, step in enumerate(arm.steps):
            initialise = arm.initialise if number == 0 and arm.experts != "none" else None
            links.append(self._link(links[-1].key, self.stage(step, seed), config, rate, seed, initialise))
        return links

    def _link(self, before: str, stage: Stage, config: ModelConfig, rate: float, seed: int, initialise: Initialise | None) -> Link:
        said = (before, repr(stage), repr(config), f"{rate:.9g}", seed, initialise, self.setting.digest, POINTS)
        return Link(hashlib.sha256(repr(said).encode()).hexdigest()[:20], stage, config, rate, seed, initialise)

    # ---- what is there -------------------------------------------------------------------------------------------------------------

    def record(self, link: Link) -> dict[str, Any] | None:
        """What a link reported, None before it is trained."""
        path = self.folder / link.key / "record.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def parameters(self, link: Link) -> Tree:
        """The parameters that a link left."""
        return unflatten({path: jnp.asarray(x) for path, x in load_file(self.folder / link.key / "parameters.safetensors").items()})

    def run(self, arm: Arm, rate: float, seed: int) -> list[dict[str, Any]]:
        """The records of a whole chain; trains what is not there."""
        records, before = [], None
        for link in self.chain(arm, rate, seed):
            with locked(self.folder / f"{link.key}.lock", wait=True):
                record = self.record(link)
                if record is None:
                    record = self._train(link, before)
            records.append(record)
            before = link
        return records

    # ---- training ------------------------------------------------------------------------------------------------------------------

    def start(self, link: Link, before: Link | None) -> Tree:
        """The parameters that a link starts from: those of the link before, with freshly made visual parts after stage 0.

        "zero output" experts are random ones whose last matrices are 0: at first they add nothing.
        """
        fresh = _fresh(link.config, link.seed)
        if before is None:
            return fresh
        old = flatten(self.parameters(before))
        tree = unflatten({path: old.get(path, leaf) for path, leaf in flatten(fresh).items()})
        if link.initialise == "copy":
            return initialise_experts(tree)
        if link.initialise == "zero output":
            last = ("/visual/down", "/visual/out")
            return unflatten({path: jnp.zeros_like(x) if path.endswith(last) else x for path, x in flatten(tree).items()})
        return tree

    def _step(self, link: Link, trainable: Tree, frozen: Tree) -> tuple[Optimizer, Any]:
        """The optimizer and the compiled step of a link: one program for all that train the same parameters on rows of one shape."""
        same = {"name": "any", "steps": 1, "warmup_steps": 0, "schedule": "constant", "mixture": {"any": 1.0}, "seed": 0}
        stage = dataclasses.replace(link.stage, **same)
        key = (link.config, repr(stage))
        if key not in self._compiled:
            optimizer = optimizer_with_rate(stage)
            options = compiler_options(jax.devices()[0].device_kind)
            graphdef = model_structure(link.config).graphdef
            step = make_train_step(graphdef, optimizer, self.setting.ops, trainable, frozen, self._mesh, compiler_options=options)
            self._compiled[key] = optimizer, step
        return self._compiled[key]

    def _train(self, link: Link, before: Link | None) -> dict[str, Any]:
        stage, began = link.stage, time.monotonic()
        chosen = Recipe("ablation", link.config, (stage,)).trainable_paths(stage)
        trainable, frozen = split_tree(place_parameters(self.start(link, before), self._mesh), chosen)
        trainable = cast(trainable, jnp.float32, copy=True)
        optimizer, step = self._step(link, trainable, frozen)
        state = jax.device_put(optimizer.transform.init(trainable), optimizer_shardings(optimizer, trainable, self._mesh))
        rates = np.asarray(learning_rate_schedule(dataclasses.replace(stage, learning_rate=link.rate))(np.arange(stage.steps)))
        visual = stage.tiles_per_row > 0
        score_at = {round(stage.steps * (n + 1) / POINTS) for n in range(POINTS)} if visual else {stage.steps}
        batches = Prefetcher(self.setting.feed(link.config)(stage, 0), functools.partial(place_batch, mesh=self._mesh))
        curve, losses, tokens, scoring = [], [], [], 0.0
        try:
            for number in range(1, stage.steps + 1):
                batch = batches.next()
                rate = jax.device_put(rates[number - 1], replicated(self._mesh))
                trainable, state, metrics = step(trainable, with_rate(state, rate), frozen, batch)
                losses.append(metrics["loss"])
                tokens.append(metrics["tokens"])
                if number in score_at:
                    jax.block_until_ready(trainable)
                    paused = time.monotonic()
                    curve.append({"step": number, "rows": number * stage.batch_size, **self._scores(link, merge_trees(trainable, frozen))})
                    scoring += time.monotonic() - paused
        finally:
            batches.close()
        values = np.array(jax.device_get(losses), np.float64)
        tail = values[-max(1, stage.steps // 10) :]
        record = {
            "key": link.key,
            "stage": stage.name,
            "steps": stage.steps,
            "rows": stage.steps * stage.batch_size,
            "tokens": sum(map(int, jax.device_get(tokens))),
            "rate": link.rate,
            "seed": link.seed,
            "loss": float(tail.mean()) if np.isfinite(tail).all() else None,
            "scores": {k: v for k, v in curve[-1].items() if k not in ("step", "rows")},
            "curve": curve,
            "seconds": time.monotonic() - began,
            "scoring_seconds": scoring,
            "trainable_parameters": int(sum(np.prod(x.shape) for x in flatten(trainable).values())),
        }
        self._keep(link, merge_trees(trainable, frozen), record)
        return record

    def _scores(self, link: Link, tree: Tree) -> dict[str, float]:
        graphdef = model_structure(link.config).graphdef
        scores = self.setting.text_scores(graphdef, tree)
        return scores | self.setting.visual_scores(graphdef, tree) if link.stage.tiles_per_row else scores

    def _keep(self, link: Link, tree: Tree, record: dict[str, Any]) -> None:
        """Parameters first, then the record, which makes the link complete."""
        folder = self.folder / link.key
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".parameters.tmp"
        save_file({path: np.asarray(leaf) for path, leaf in flatten(tree).items()}, temporary)
        os.replace(temporary, folder / "parameters.safetensors")
        write_json(folder / "record.json", record)
