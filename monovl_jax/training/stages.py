"""What a run does: a `Recipe` is a model config and a list of `Stage`s, all frozen dataclasses. A variant is `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from monovl_jax.config import ModelConfig
from monovl_jax.training.lora import Lora, target_paths
from monovl_jax.training.trainable import TrainableError, model_structure, select

Schedule = Literal["constant", "cosine"]
LossWeighting = Literal["token", "sample", "square"]


MOST_SEEDS = 1 << 32


class RecipeError(ValueError):
    """A recipe that cannot run; the message names stage, field and mend."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: the same data mixture, trainable parameters and schedule for `steps` optimizer steps.

    name: also a folder name. trainable: regexes over parameter paths (`training.trainable`). steps: optimizer steps.
    batch_size: rows of the global batch of one step, all micro-batches and hosts; a row is a pack, or a sample where nothing is packed.
    accumulation: micro-batches a step; must divide batch_size and text_rows.
    learning_rate: the peak, reached after `warmup_steps` of linear warm-up; then constant, or a cosine down to final_fraction of it.
    clip: largest global gradient norm. weight_decay: of matrices; norms and biases have none.
    sequence_length: token slots of a row. tiles_per_row: tile slots of a row; 0 for a stage of text alone.
    mixture: {source name: weight}, weights relative. text_rows, text_length, text_mixture: a second, text-only part of every batch.
    loss_weighting: weight of each of the n supervised tokens of a sample: 'token' 1, 'sample' 1/n, 'square' 1/sqrt(n).
    seed: of the order of the data.
    lora: adapters trained beside (or, with an empty `trainable`, instead of) the parameters, and merged when the stage ends.
    """

    name: str
    trainable: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    sequence_length: int
    tiles_per_row: int
    mixture: Mapping[str, float] = dataclasses.field(hash=False)
    accumulation: int = 1
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    text_rows: int = 0
    text_length: int = 0
    text_mixture: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    loss_weighting: LossWeighting = "token"
    seed: int = 0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, problem: str) -> None:
            if not condition:
                raise RecipeError(f"stage {self.name!r}: {problem}")

        require(bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name), "the name may hold letters, digits and . _ - only")
        require(len(self.trainable) > 0 or self.lora is not None, "trainable is empty; give at least one regex, or lora")
        for field in ("steps", "batch_size", "accumulation", "sequence_length"):
            require(getattr(self, field) >= 1, f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("tiles_per_row", "warmup_steps", "text_rows", "text_length"):
            require(getattr(self, field) >= 0, f"{field} is {getattr(self, field)}; it must not be negative")
        for field in ("learning_rate", "eps", "clip"):
            require(0 < getattr(self, field) < math.inf, f"{field} is {getattr(self, field)}; it must be a positive number")
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, f"{field} is {getattr(self, field)}; it must be in [0, 1)")
        require(0 <= self.final_fraction <= 1, f"final_fraction is {self.final_fraction}; it must be in [0, 1]")
        require(0 <= self.seed < MOST_SEEDS, f"seed is {self.seed}; give a number from 0 to {MOST_SEEDS - 1}")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative")
        require(self.schedule in ("constant", "cosine"), f"schedule is {self.schedule!r}; use 'constant' or 'cosine'")
        require(
            self.loss_weighting in ("token", "sample", "square"),
            f"loss_weighting is {self.loss_weighting!r}; use 'token', 'sample' or 'square'",
        )
        for field in ("batch_size", "text_rows"):
            rows = getattr(self, field)
            require(rows % self.accumulation == 0, f"{field} is {rows}, no multiple of accumulation {self.accumulation}")
        require((self.text_rows > 0) == (self.text_length > 0), "text_rows and text_length must be given together")
        require(self.warmup_steps <= self.steps, f"warmup_steps is {self.warmup_steps}, more than the {self.steps} steps")
        for field, mixture in (("mixture", self.mixture), ("text_mixture", self.text_mixture)):
            for source, weight in mixture.items():
                require(
                    0 < weight < math.inf, f"{field} gives source {source!r} the weight {weight}; give a positive number or leave it out"
                )
        require(bool(self.mixture), "mixture is empty; name at least one source")
        require(bool(self.text_mixture) == (self.text_rows > 0), "text_mixture and text_rows must be given together")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole run: a model through its stages, in order.

    copy_experts_before: the stage before which visual experts become copies of the text experts (the first that trains them); None for
    weights that have trained experts already. seed: of the random initialisation; the data order has its own seed per stage.
    """

    name: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    copy_experts_before: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MOST_SEEDS:
            raise RecipeError(f"recipe {self.name!r}: seed is {self.seed}; give a number from 0 to {MOST_SEEDS - 1}")
        names = [stage.name for stage in self.stages]
        if not names:
            raise RecipeError(f"recipe {self.name!r} has no stage; give at least one")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise RecipeError(f"recipe {self.name!r} has two stages called {sorted(repeated)[0]!r}; a name is a folder, rename one")
        if self.copy_experts_before is not None and self.copy_experts_before not in names:
            raise RecipeError(
                f"recipe {self.name!r}: copy_experts_before is {self.copy_experts_before!r}, which is no stage; stages: {', '.join(names)}"
            )
        if self.copy_experts_before is not None and self.model.decoder.experts == "none":
            raise RecipeError(f"recipe {self.name!r}: copy_experts_before is set, but the model has no visual experts")

    def stage(self, name: str) -> Stage:
        """A stage by name. Raises RecipeError listing the names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise RecipeError(f"recipe {self.name!r} has no stage {name!r}; it has: {', '.join(stage.name for stage in self.stages)}")

    def trainable_paths(self, stage: Stage) -> frozenset[str]:
        """The parameters that a stage trains, found without allocating any. Raises RecipeError for a regex that matches nothing."""
        shape = model_structure(self.model)
        try:
            chosen = select(shape.paths, stage.trainable, shape.stored)
            adapted = target_paths(shape.shapes, stage.lora) if stage.lora else frozenset()
        except TrainableError as error:
            raise RecipeError(f"stage {stage.name!r}: {error}") from None
        if both := sorted(chosen & adapted):
            raise RecipeError(
                f"stage {stage.name!r}: {both[0]} is trained and has a lora adapter; take it out of trainable or of lora.targets"
            )
        return chosen
