"""A run directory: whose it is, who may continue it, and how to read it back.

    RUN/experiment.json             the recipe and everything else that decides the numbers, with a digest
    RUN/stages/<stage>/...          the folder of each stage: see `training.store`

The directory may be local or lie in a bucket (`gs://...`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig
from monovl_jax.parallel.sharding import parameter_shardings
from monovl_jax.training.files import AnyPath, canonical, is_intact, is_remote, place, sealed, write_json
from monovl_jax.training.lora import merged
from monovl_jax.training.stages import Recipe
from monovl_jax.training.store import DamagedError, RunError, StageStore, abstract
from monovl_jax.training.trainable import TrainableError, Tree, check_tree, merge_trees, model_structure

FORMAT = 1
EXPERIMENT = "experiment.json"


# ---- the experiment ----------------------------------------------------------------------------------------------------------------


def experiment(recipe: Recipe, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values: `recipe`, `identity` and a `digest` over both.

    identity: anything else that matters (compute dtype, fingerprints of data and of initial weights); JSON values. Mesh, checkpoint and log
    intervals are no part of it: they may change between two runs of the same experiment.
    """
    body = jsontext.loads(canonical({"recipe": dataclasses.asdict(recipe), "identity": dict(identity or {})}))
    upstream = body["recipe"]["model"].pop("upstream")
    return sealed({"format": FORMAT, "digest": _digest(body), **body, "upstream": upstream})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({key: body[key] for key in ("recipe", "identity")})).hexdigest()


def read_experiment(run_dir: str | AnyPath) -> dict[str, Any]:
    """The `experiment.json` of a run.

    Raises RunError when the directory is no run or is of another format, DamagedError when the file is not as it was written.
    """
    path = place(run_dir) / EXPERIMENT
    fix = "Restore it from a copy, or give another run directory"
    try:
        raw = jsontext.read(path)
    except FileNotFoundError:
        raise RunError(f"{run_dir} is no run directory: it has no {EXPERIMENT}") from None
    except (OSError, jsontext.JsonError) as error:
        raise DamagedError(f"{path} cannot be read ({error}). {fix}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise RunError(f"{path} has format {str(found)[:40]}, this version reads {FORMAT}; use the version that wrote it")
    for field, kind in (("digest", str), ("recipe", dict), ("identity", dict), ("upstream", str)):
        if not isinstance(raw.get(field), kind):
            raise DamagedError(f"{path} is damaged ({field} is {str(raw.get(field))[:40]!r}, not of type {kind.__name__}). {fix}")
    if raw["digest"] != _digest(raw) or not is_intact(raw):
        raise DamagedError(f"{path} is damaged (its contents do not fit its digest). {fix}")
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


def claim_run(run_dir: str | AnyPath, wanted: Mapping[str, Any]) -> bool:
    """Makes a run directory for an experiment, or checks that it belongs to it. Returns whether it was there before.

    What was written is compared as `read_recipe` reads it: a field that is newer than the run has its default there.

    Raises RunError when it belongs to another experiment (says what differs), or holds stages but no experiment.
    """
    run = place(run_dir)
    if (run / EXPERIMENT).exists():
        found = experiment(read_recipe(run), read_experiment(run)["identity"])
        if what := differences(found, wanted):
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
def run_lock(run_dir: str | AnyPath) -> Iterator[None]:
    """Holds a run directory for this process; the lock dies with it. Raises RunError when another process holds it.

    Buckets, and systems without such locks, have none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if is_remote(run_dir):
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
    """The value of a type hint (dataclasses, unions, tuples, mappings, literals, plain types) from its JSON form. Raises DamagedError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        chosen = next((k for k in inner if (k is type(None)) == (value is None)), None)
        return None if value is None and type(None) in inner else _build(chosen, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        _require_type(dict, value, where)
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise RunError(f"{where} has the unknown field {unknown[0]!r}; it was written by another version")
        fields = {key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()}
        try:
            return kind(**fields)
        except (TypeError, ValueError) as error:
            raise DamagedError(f"{where} cannot be used ({error}); restore the file from a copy") from None
    if origin is tuple:
        _require_type(list, value, where)
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise DamagedError(f"{where} has {len(value)} entries, not {len(kinds)}; restore the file from a copy")
        return tuple(_build(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require_type(dict, value, where)
        return {key: _build(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        if value not in inner:
            raise DamagedError(f"{where} is {str(value)[:40]!r}, none of {', '.join(map(repr, inner))}; restore the file from a copy")
        return value
    _require_type((int, float) if kind is float else kind, value, where)
    return value


def _require_type(kind: Any, value: Any, where: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DamagedError(f"{where} is {str(value)[:40]!r}, which is of another type than it should be; restore the file from a copy")


def read_recipe(run_dir: str | AnyPath) -> Recipe:
    """The recipe of a run. Raises RunError (`read_experiment`), or DamagedError when it is none that this version can run."""
    raw = read_experiment(run_dir)
    where = f"{place(run_dir) / EXPERIMENT}: recipe"
    _require_type(dict, raw["recipe"].get("model"), f"{where}.model")
    recipe = {**raw["recipe"], "model": {**raw["recipe"]["model"], "upstream": raw["upstream"]}}
    return _build(Recipe, recipe, where)


# ---- reading it back ---------------------------------------------------------------------------------------------------------------


def _places(mesh: Mesh | None) -> Callable[[Tree], Any]:
    """A sharding for every parameter of a tree: by the rules on a mesh, else the first device."""
    one = SingleDeviceSharding(jax.local_devices()[0])
    return lambda shapes: jax.tree.map(lambda _: one, shapes) if mesh is None else parameter_shardings(shapes, mesh)


def _check_model(tree: Any, config: ModelConfig, where: AnyPath) -> None:
    try:
        check_tree(tree, model_structure(config).shapes, str(where))
    except TrainableError as error:
        raise RunError(f"{error} (is it of another model config?); give another run directory, or delete this one") from None


def final_target(folder: AnyPath, config: ModelConfig, mesh: Mesh | None = None) -> Tree:
    """The abstract tree of a `final`: shapes of the model, dtypes as they were saved; on the first device, or on a mesh by the rules."""
    saved = StageStore(folder.parent.parent.parent, folder.parent.name).final_shapes()
    _check_model(saved, config, folder)
    return abstract(saved, _places(mesh)(model_structure(config).shapes))


def final_folder(run_dir: str | AnyPath, stage: str | None = None) -> tuple[ModelConfig, AnyPath]:
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
            f"{run_dir}: {which} {'has finished yet' if stage is None else 'has not finished'}; {known}. "
            "`--step latest` takes its last checkpoint; the command that trains it goes on"
        )
    return recipe.model, stores[chosen].final


Step = int | Literal["latest"]
"""A step checkpoint of a stage, or what was saved last."""


def find_step(run_dir: str | AnyPath, stage: str | None, step: Step) -> tuple[str, int | None]:
    """(stage, step) of a checkpoint; None in place of a step stands for the end of the stage.

    stage: by default the last one that has saved something. Raises RunError when nothing is saved there; the run may be going on.
    """
    recipe = read_recipe(run_dir)
    if stage is not None and stage not in [s.name for s in recipe.stages]:
        raise RunError(f"{run_dir} has no stage {stage!r}; its stages: {', '.join(s.name for s in recipe.stages)}")
    stores = {s.name: StageStore(run_dir, s.name) for s in recipe.stages if stage in (None, s.name)}
    saved = [name for name, store in stores.items() if store.has_final() or store.latest() is not None]
    if not saved:
        raise RunError(f"{run_dir}: {'no stage' if stage is None else f'stage {stage!r}'} has saved a checkpoint yet; wait for the first")
    if step != "latest":
        return saved[-1], step
    return saved[-1], None if stores[saved[-1]].has_final() else stores[saved[-1]].latest()


def load_run(
    run_dir: str | AnyPath, stage: str | None = None, mesh: Mesh | None = None, step: Step | None = None
) -> tuple[ModelConfig, Tree]:
    """(config, parameters as a nested dict) of a run, after a stage or in the middle of one.

    Args:
      stage: by default the last one that has finished training; with `step` the last one that has saved something.
      mesh: where to put them; by default on the first device.
      step: of the stage, or "latest" for what was saved last; the end of the stage by default.

    Raises RunError when the directory is no run or has no such checkpoint, DamagedError when it is not what was written.
    """
    if step is not None:
        stage, number = find_step(run_dir, stage, step)
        if number is not None:
            return load_step(run_dir, stage, number, mesh)
    config, final = final_folder(run_dir, stage)
    return config, StageStore(run_dir, final.parent.name).restore_final(final_target(final, config, mesh))


def step_store(run_dir: str | AnyPath, stage: str, step: int) -> tuple[Recipe, StageStore]:
    """(recipe, store) of a step checkpoint that is there. Raises RunError when it is not, saying which are."""
    recipe = read_recipe(run_dir)
    if stage not in (names := [s.name for s in recipe.stages]):
        raise RunError(f"{run_dir} has no stage {stage!r}; its stages: {', '.join(names)}")
    store = StageStore(run_dir, stage)
    if step not in (steps := store.all_steps()):
        raise RunError(f"{run_dir}: stage {stage!r} has no checkpoint of step {step}; it has: {', '.join(map(str, steps)) or 'none'}")
    return recipe, store


def load_step(run_dir: str | AnyPath, stage: str, step: int, mesh: Mesh | None = None) -> tuple[ModelConfig, Tree]:
    """(config, parameters as a nested dict) of a run in the middle of a stage: a step checkpoint and its base, adapters merged.

    mesh: where to put them; by default on the first device. Raises RunError when there is no such checkpoint or its base is another,
    DamagedError when it is not what was written.
    """
    recipe, store = step_store(run_dir, stage, step)
    trainable, frozen = store.restore_parameters(step, _places(mesh))
    parameters = merge_trees(*merged(trainable, frozen, recipe.stage(stage).lora))
    _check_model(parameters, recipe.model, store.step_folder(step))
    return recipe.model, parameters


__all__ = [
    "EXPERIMENT", "RunError", "StageStore", "abstract", "claim_run", "differences", "experiment", "final_folder", "final_target",
    "load_run", "load_step", "read_experiment", "read_recipe", "run_lock", "step_store", "write_json",
]  # fmt: skip
