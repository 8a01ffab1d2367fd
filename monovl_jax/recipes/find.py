"""From a name on the command line to a `Recipe`: those of this package, and files of the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import monovl_jax.recipes
from monovl_jax.config import ConfigError, ModelConfig
from monovl_jax.training.stages import Recipe, RecipeError

DEFAULT_NAME = "recipe"
"""What is looked for in a module or file when no name is given."""


def known_recipes() -> list[str]:
    """Names that `find_recipe` knows without a file: modules of this package with a `recipe`."""
    names = [module.name for module in pkgutil.iter_modules(monovl_jax.recipes.__path__) if module.name not in ("feed", "find", "launch")]
    return [name for name in names if hasattr(importlib.import_module(f"monovl_jax.recipes.{name}"), DEFAULT_NAME)]


def find_recipe(spec: str, model: ModelConfig | None = None) -> Recipe:
    """The recipe that `evip`, `evip:NAME` or `FILE.py:NAME` stands for; NAME is a Recipe or a function that gives one.

    Without NAME it is `recipe`. A function may take one argument: the config `model` of the weights to start from.

    Raises RecipeError, or ConfigError where the file does.
    """
    source, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    name = name or DEFAULT_NAME
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if isinstance(value, Recipe) or _gives_a_recipe(value)]
        raise RecipeError(f"{source} has no {name!r}; recipes in it: {', '.join(there) or 'none'}. Write {source}:NAME")
    value = getattr(module, name)
    if not isinstance(value, Recipe) and callable(value):
        where = f"{source}:{name}"
        if _accepts(value, 0):
            value = _called(value, where)
        elif not _accepts(value, 1):
            raise RecipeError(f"{where} needs arguments; give a Recipe, or a function that takes nothing or the model config alone")
        elif model is None:
            raise RecipeError(f"{where} works on a model you bring; give --init DIR")
        else:
            value = _called(lambda: value(model), where)
    if not isinstance(value, Recipe):
        raise RecipeError(f"{source}:{name} is a {type(value).__name__}; give a monovl_jax.training.stages.Recipe or a function giving one")
    return value


def _accepts(function: Callable[..., Any], arguments: int) -> bool:
    """Whether a function can be called with so many arguments; calling tells for one without a signature."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _gives_a_recipe(value: Any) -> bool:
    return inspect.isfunction(value) and value.__annotations__.get("return") in (Recipe, "Recipe")


def _called(function: Callable[[], Any], where: str) -> Any:
    try:
        return function()
    except (RecipeError, ConfigError):
        raise
    except Exception as error:  # a user's code may raise anything
        raise RecipeError(f"{where} fails: {type(error).__name__}: {error}{_line_of(error, where.partition('.py')[0] + '.py')}") from error


def _line_of(error: BaseException, file: str) -> str:
    """` (FILE line N)`, the last place in `file` that an error passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == Path(file).name]
    return f" ({file} line {lines[-1]})" if lines else ""


def _load_module(name: str) -> ModuleType:
    short, known = name.removeprefix("monovl_jax.recipes."), known_recipes()
    if short not in known:
        raise RecipeError(f"no recipe is called {name!r}; known: {', '.join(known)}; a recipe of your own is FILE.py:NAME")
    return importlib.import_module(f"monovl_jax.recipes.{short}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"the recipe file {path} does not exist; correct the path")
    spec = importlib.util.spec_from_file_location(f"_recipe_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"the recipe file {path} cannot be loaded as Python; correct the path")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[spec.name] = module  # dataclasses defined in the file look themselves up
    _called(lambda: loader.exec_module(module), str(path))
    return module


def adapted(recipe: Recipe, stages: Sequence[str] = (), steps: int | None = None, seed: int | None = None, **changes: Any) -> Recipe:
    """A recipe cut to some of its stages (in its own order), with other steps in each, or another seed of weights and data.

    changes: other values for fields of every stage, None for the recipe's own. The warm-up is never longer than the stage. Raises
    RecipeError for an unknown stage or a value that a stage cannot have.
    """
    wanted = {recipe.stage(name).name for name in stages} or {stage.name for stage in recipe.stages}
    chosen = tuple(stage for stage in recipe.stages if stage.name in wanted)
    if steps is not None:
        chosen = tuple(dataclasses.replace(s, steps=steps, warmup_steps=max(0, min(s.warmup_steps, steps))) for s in chosen)
    if given := {field: value for field, value in changes.items() if value is not None}:
        chosen = tuple(dataclasses.replace(stage, **given) for stage in chosen)
    if seed is not None:
        chosen = tuple(dataclasses.replace(stage, seed=seed) for stage in chosen)
    copy = recipe.copy_experts_before if recipe.copy_experts_before in wanted else None
    return dataclasses.replace(recipe, stages=chosen, copy_experts_before=copy, seed=recipe.seed if seed is None else seed)
