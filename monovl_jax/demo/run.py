"""`monovl demo`: trains the whole job on the embedded world, scores every stage, writes metrics.json and report.html."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from monovl_jax.config import config_to_json
from monovl_jax.data.pipeline import Part
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.demo.lessons import LESSONS
from monovl_jax.demo.recipe import demo_recipe, initial_parameters
from monovl_jax.demo.report import write_report
from monovl_jax.demo.scoring import Evaluator, frozen_guarantee
from monovl_jax.demo.source import Layout, WorldSource
from monovl_jax.demo.text import build_tokenizer
from monovl_jax.demo.world import World
from monovl_jax.model import Ops
from monovl_jax.recipes.feed import Feed
from monovl_jax.training.loop import train
from monovl_jax.training.stages import Recipe, Stage

SAMPLES = 1 << 18
"""Samples of a lesson before it repeats; more than any stage reads."""


def batches(world: World, layout: Layout, recipe: Recipe) -> Feed:
    """The data of every stage: a lesson of the world by name."""

    def parts(stage: Stage, mixture: Mapping[str, float], tokens: int, tiles: int) -> list[Part]:
        del tokens, tiles
        return [Part(WorldSource(world, LESSONS[name], layout, stage.seed, SAMPLES), weight, name) for name, weight in mixture.items()]

    return Feed(recipe.model.vision, layout.context_id, parts, window=512)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare(run_dir: Path, quick: bool, seed: int) -> tuple[World, Layout, Recipe]:
    """The world, its token layout and the recipe; writes tokenizer and config.json into the run directory."""
    build_tokenizer(run_dir)
    tokenizer = Tokenizer.from_folder(run_dir)
    recipe = demo_recipe(tokenizer.vocab_size, quick, seed)
    vision = recipe.model.vision
    (run_dir / "config.json").write_text(config_to_json(recipe.model), encoding="utf-8")
    return World(), Layout(tokenizer, vision.tile_size, vision.tokens_per_tile), recipe


def lessons_digest() -> str:
    """Identifies what the lessons teach, so that a run is not continued on other data."""
    return hashlib.sha256(repr(sorted(LESSONS.items())).encode()).hexdigest()[:16]


def metrics(recipe: Recipe, records: dict[str, Any], started: float) -> dict[str, Any]:
    """metrics.json: scores.<stage>.<task>.{exact, n, blind, untrained}, text_perplexity.<stage>, seconds.<stage>, peak_rss_bytes ..."""
    text, *visual = [stage.name for stage in recipe.stages]
    evaluations = {name: records[name]["evaluation"] for name in records}
    untrained = evaluations[text]["scores"]
    scores = {}
    for stage in visual:
        e = evaluations[stage]
        scores[stage] = {
            task: {
                **value,
                "blind": e["blind"][task]["exact"],
                "shuffled": e["shuffled"][task]["exact"],
                "untrained": untrained[task]["exact"],
            }
            for task, value in e["scores"].items()
        }
    trained = {stage.name: recipe.trainable_paths(stage) for stage in recipe.stages}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "scores": scores,
        "text_perplexity": {stage: e["perplexity"]["prose"] for stage, e in evaluations.items()},
        "told_perplexity": {stage: e["perplexity"]["told"] for stage, e in evaluations.items()},
        "frozen": frozen_guarantee(evaluations, trained),
        "seconds": {stage: records[stage]["seconds"] for stage in records},
        "evaluation_seconds": {stage: records[stage]["evaluation_seconds"] for stage in records},
        "steps": {stage: records[stage]["steps"] for stage in records},
        "total_seconds": time.time() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "devices": [str(d.device_kind) for d in jax.devices()],
        "jax": jax.__version__,
    }


def demo(run_dir: str | Path = "runs/demo", quick: bool = False, seed: int = 0, questions: int | None = None) -> dict[str, Any]:
    """Trains, scores and reports; returns what metrics.json holds. Rerun with the same arguments to resume.

    questions: held-out questions per task (by default 200, and 40 with `quick`; all 360 digits from 200 on).
    """
    started = time.time()
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    world, layout, recipe = prepare(run_dir, quick, seed)
    ops, feed = Ops(), batches(world, layout, recipe)
    evaluator = Evaluator(world, layout, recipe.model, ops, questions or (40 if quick else 200))
    records = train(
        recipe,
        run_dir,
        feed,
        data_state=feed,
        evaluate=evaluator,
        initial=lambda: initial_parameters(recipe),
        ops=ops,
        checkpoint_every=200,
        identity={"lessons": lessons_digest(), "tokenizer": layout.tokenizer.fingerprint()},
    )
    result = metrics(recipe, records, started)
    (run_dir / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_report(run_dir, result, records, evaluator.sets)
    return result
