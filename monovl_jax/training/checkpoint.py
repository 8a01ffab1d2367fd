"""A run directory: what lies where, who may continue it, and how to read it back.

    RUN/experiment.json             the recipe and everything else that decides the numbers, with a digest
    RUN/stages/<stage>/base         the frozen leaves, written when the stage starts          } removed when `final`
    RUN/stages/<stage>/steps/<n>    trainable leaves, optimizer state, step, data position    } is there
    RUN/stages/<stage>/final        every parameter of the model after the stage
    RUN/stages/<stage>/done.json    steps, seconds, last loss, what the evaluation returned

Every piece is written beside its name and renamed when complete: a kill at any instant leaves the last complete one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from monovl_jax.config import ModelConfig
from monovl_jax.parallel.sharding import parameter_shardings
from monovl_jax.training.stages import Recipe
from monovl_jax.training.trainable import TrainableError, Tree, check_tree, model_structure

FORMAT = 1
EXPERIMENT = "experiment.json"


class RunError(ValueError):
    """A run directory that cannot be used; the message says what differs or is missing, and the mend."""


# ---- the experiment ----------------------------------------------------------------------------------------------------------------


def experiment(recipe: Recipe, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values: `recipe`, `identity` and a `digest` over both.

    identity: anything else that matters (compute dtype, fingerprints of data and of initial weights); JSON values. Mesh, checkpoint and log
    intervals are no part of it: they may change between two runs of the same experiment.
    """
    body = json.loads(json.dumps({"recipe": dataclasses.asdict(recipe), "identity": dict(identity or {})}, allow_nan=False))
    upstream = body["recipe"]["model"].pop("upstream")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {"format": FORMAT, "digest": hashlib.sha256(canonical.encode()).hexdigest(), **body, "upstream": upstream}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_experiment(run_dir: str | Path) -> dict[str, Any]:
    """The `experiment.json` of a run. Raises RunError when the directory is no run, or is of another format."""
    path = Path(run_dir) / EXPERIMENT
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run_dir} is no run directory: it has no {EXPERIMENT}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or delete the run directory") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise RunError(f"{path} has format {found!r}, this version reads {FORMAT}; use the version that wrote it, or another directory")
    return raw


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _leaves(value[key], f"{prefix}.{key}" if prefix else key).items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {k: v for item in value for k, v in _leaves(item, f"{prefix}[{item['name']}]").items()}
    return {prefix: value}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One phrase for every field of two experiments that differs."""
    a, b = ({k: v for part in ("recipe", "identity") for k, v in _leaves(e.get(part), part).items()} for e in (there, here))
    absent = "absent"
    return [
        f"{key.removeprefix('recipe.')} is {a.get(key, absent)!r} there and {b.get(key, absent)!r} here"
        for key in [*a, *(k for k in b if k not in a)]
        if a.get(key, absent) != b.get(key, absent)
    ]


def claim_run(run_dir: str | Path, wanted: Mapping[str, Any]) -> bool:
    """Makes a run directory for an experiment, or checks that it belongs to it. Returns whether it was there before.

    Raises RunError when it belongs to another experiment (says what differs), or holds stages but no experiment.
    """
    run = Path(run_dir)
    if (run / EXPERIMENT).exists():
        found = read_experiment(run)
        if found["digest"] != wanted["digest"] or differences(found, wanted):
            what = differences(found, wanted) or ["its digest does not fit its own contents"]
            more = f"; and {len(what) - 5} more" if len(what) > 5 else ""
            raise RunError(f"{run} holds another experiment: {'; '.join(what[:5])}{more}. Give another run directory, or delete {run}")
        return True
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file; give a directory")
    if (run / "stages").exists():
        raise RunError(f"{run} holds stages but no {EXPERIMENT}: whose they are is unknown. Give another run directory, or delete {run}")
    run.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_json(run / EXPERIMENT, wanted)
    return False


@contextlib.contextmanager
def run_lock(run_dir: str | Path) -> Iterator[None]:
    """Holds a run directory for this process; the lock dies with it. Raises RunError when another process holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with open(Path(run_dir) / ".lock", "w") as file:
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is training in {run_dir}; wait for it, or give another run directory") from None
            except OSError:
                pass  # a file system without locks
        yield


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass (with nested ones, optional ones and tuples) of its JSON form."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next((k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)), kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise RunError(f"{where} has the unknown field {unknown[0]!r}; it was written by another version")
        return kind(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item, where) for item in value)
    return value


def read_recipe(run_dir: str | Path) -> Recipe:
    """The recipe of a run."""
    raw = read_experiment(run_dir)
    raw["recipe"]["model"]["upstream"] = raw.get("upstream", "{}")
    return _build(Recipe, raw["recipe"], f"{Path(run_dir) / EXPERIMENT}: recipe")


# ---- one stage ---------------------------------------------------------------------------------------------------------------------


def abstract(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """ShapeDtypeStructs with a place each: what to restore, and where to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree, shardings)


def _save(path: Path, tree: Tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def _saved_shapes(path: Path) -> Tree:
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(path)
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), getattr(metadata, "item_metadata", metadata).tree)


def _restore(path: Path, target: Tree, config: ModelConfig | None = None) -> Tree:
    try:
        check_tree(_saved_shapes(path), target, str(path))
    except TrainableError as error:
        whose = "" if config is None else " (is it of another model config?)"
        raise RunError(f"{error}{whose}; give another run directory, or delete this one") from None
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


class StageStore:
    """The folder of one stage.

    keep: how many step checkpoints stay. asynchronous: write step checkpoints in the background; by default everywhere but on CPU, where
    Orbax writes from the very buffers that the next step overwrites.
    """

    def __init__(self, run_dir: str | Path, stage: str, keep: int = 2, asynchronous: bool | None = None):
        self.folder = Path(run_dir).absolute() / "stages" / stage
        self.base, self.steps, self.final, self.done = (self.folder / name for name in ("base", "steps", "final", "done.json"))
        self.keep = keep
        self.asynchronous = jax.default_backend() != "cpu" if asynchronous is None else asynchronous
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> StageStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, enable_async_checkpointing=self.asynchronous, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.steps, options=options, item_names=("state", "meta"))
        return self._manager

    def has_final(self) -> bool:
        return self.final.exists()

    def record(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the stage is not done."""
        return json.loads(self.done.read_text(encoding="utf-8")) if self.done.exists() else None

    def latest(self) -> int | None:
        """The last complete step checkpoint; None when there is none."""
        return self.manager.latest_step() if self.steps.exists() and self.base.exists() else None

    def save_base(self, frozen: Tree) -> None:
        """Writes the frozen leaves, over those of an attempt that was killed before its first step checkpoint."""
        self.manager  # noqa: B018 (makes the folder, clears leftovers)
        if frozen:
            _save(self.base, frozen)
        else:
            self.base.mkdir(exist_ok=True)

    def restore_base(self, target: Tree, config: ModelConfig | None = None) -> Tree:
        return _restore(self.base, target, config) if target else {}

    def save(self, step: int, trainable: Tree, opt_state: Any, meta: Mapping[str, Any]) -> None:
        """Writes a step checkpoint; `meta` is JSON. Complete on return unless asynchronous."""
        state = {"trainable": trainable, "opt_state": opt_state}
        self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))))

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Tree, Any, dict[str, Any]]:
        """(trainable, opt_state, meta) of a step checkpoint, placed as the two abstract trees say. Raises RunError when they do not fit."""
        target = {"trainable": trainable, "opt_state": opt_state}
        try:
            back = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.steps / str(step)} does not fit this model ({error}); give another run directory, or delete this one"
            ) from None
        return back["state"]["trainable"], back["state"]["opt_state"], dict(back["meta"])

    def save_final(self, parameters: Tree, record: Mapping[str, Any]) -> None:
        """Writes the whole model, then drops what it makes unnecessary."""
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            write_json(self.folder / "trained.json", dict(record))
        _save(self.final, parameters)

    def trained(self) -> dict[str, Any]:
        """What `save_final` recorded."""
        return json.loads((self.folder / "trained.json").read_text(encoding="utf-8"))

    def drop_steps(self) -> None:
        """Removes step checkpoints and base: a stage with a `final` is never continued."""
        self.__exit__()
        if jax.process_index() == 0 and self.has_final():
            for folder in (self.steps, self.base):
                shutil.rmtree(folder, ignore_errors=True)

    def restore_final(self, target: Tree, config: ModelConfig | None = None) -> Tree:
        return _restore(self.final, target, config)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Marks the stage as done."""
        if jax.process_index() == 0:
            write_json(self.done, dict(record))


def final_target(folder: Path, config: ModelConfig, mesh: Mesh | None = None) -> Tree:
    """The abstract tree of a `final`: shapes of the model, dtypes as they were saved; on the first device, or on a mesh by the rules."""
    shapes, saved = model_structure(config).shapes, _saved_shapes(folder)
    try:
        check_tree(saved, shapes, str(folder))
    except TrainableError as error:
        raise RunError(f"{error} (is it of another model config?); give another run directory, or delete this one") from None
    one = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: one, shapes) if mesh is None else parameter_shardings(shapes, mesh)
    return abstract(saved, places)


def final_folder(run_dir: str | Path, stage: str | None = None) -> tuple[ModelConfig, Path]:
    """(config, Orbax folder of the parameters) of a run after a stage, by default the last one that has finished training.

    Raises RunError when the directory is no run or the stage has not finished.
    """
    recipe = read_recipe(run_dir)
    stores = {s.name: StageStore(run_dir, s.name) for s in recipe.stages}
    finished = [name for name, store in stores.items() if store.has_final()]
    if stage is not None and stage not in stores:
        raise RunError(f"{run_dir} has no stage {stage!r}; its stages: {', '.join(stores)}")
    chosen = stage if stage is not None else (finished or [None])[-1]
    if chosen is None or chosen not in finished:
        which = "no stage" if stage is None else f"stage {stage!r}"
        known = f"finished: {', '.join(finished) or 'none'}"
        raise RunError(
            f"{run_dir}: {which} {'has finished yet' if stage is None else 'has not finished'}; {known}. Rerun the command that trains it"
        )
    return recipe.model, stores[chosen].final


def load_run(run_dir: str | Path, stage: str | None = None, mesh: Mesh | None = None) -> tuple[ModelConfig, Tree]:
    """(config, parameters as a nested dict) of a run, after a stage.

    Args:
      stage: by default the last one that has finished training.
      mesh: where to put them; by default on the first device.

    Raises RunError when the directory is no run or the stage has not finished.
    """
    config, final = final_folder(run_dir, stage)
    return config, _restore(final, final_target(final, config, mesh), config)
