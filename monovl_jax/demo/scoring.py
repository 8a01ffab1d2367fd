"""Scores of the demo: exact match of generated answers, text perplexity, and the proof that the text side was frozen."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monovl_jax.config import ModelConfig
from monovl_jax.data.packing import PackSpec
from monovl_jax.data.pipeline import one_pass
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.demo.source import DialogSource, Layout
from monovl_jax.demo.world import Dialog, EvaluationItem, World
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.model import Ops
from monovl_jax.training.step import make_eval_step
from monovl_jax.training.trainable import Tree, flatten, initialise_experts

SCENE_TASKS = ("scene_what", "scene_where", "scene_count", "scene_colour", "scene_there")
TASKS = ("digits", "words", *SCENE_TASKS, "captions", "single", "words_natural")
ANSWER_TOKENS = {"captions": 24}
ROWS = 100
GALLERY = 4


def exact(answer: str, want: str) -> bool:
    """Whether two answers agree up to surrounding white space."""
    return answer.strip() == want.strip()


class Evaluator:
    """Called by the training loop at the end of each stage; returns what `done.json` keeps.

    questions: per task (the digits task takes at most all 360 held-out scans).
    """

    def __init__(self, world: World, layout: Layout, config: ModelConfig, ops: Ops, questions: int, text: int = 64):
        self.layout, self.config, self.ops = layout, config, ops
        sets = world.evaluation_sets(questions)
        self.sets = {task: sets[task][: max(questions, 360 if questions >= 200 else questions)] for task in TASKS}
        self._tiling = TilingConfig(tile_size=layout.tile_size, max_tiles=6, use_thumbnail=False)
        self._text = {kind: self._packed(world.held_out_text(kind, text)) for kind in ("prose", "told")}
        self._compiled: dict[str, Any] = {}

    def _packed(self, dialogs: Sequence[Dialog]) -> list[dict[str, np.ndarray]]:
        spec = PackSpec(128, 0, self.layout.visual_tokens_per_tile, self.layout.tile_size, self.layout.context_id)
        source = DialogSource([d for d in dialogs if len(self.layout.dialog(d)[0]) <= spec.tokens], self.layout)
        keys = ("tokens", "positions", "segment_ids", "targets", "loss_weights")
        return [{k: batch[k] for k in keys} for batch in one_pass(source, spec, 16)]

    def __call__(self, stage: str, graphdef: Any, parameters: Tree) -> dict[str, Any]:
        if stage == "S0":
            parameters = initialise_experts(parameters)  # the untrained baseline: what S1.1 starts from
        record: dict[str, Any] = {"perplexity": self.perplexity(graphdef, parameters)}
        record["text_logits_sha256"] = self.text_logits_digest(graphdef, parameters)
        record["leaf_sha256"] = {path: _digest(leaf) for path, leaf in flatten(parameters).items()}
        generator = self.generator(parameters)
        scores, gallery = self.score(generator, "picture")
        record["scores"], record["gallery"] = scores, gallery
        if stage != "S0":
            record["blind"] = self.score(generator, "none")[0]
            record["shuffled"] = self.score(generator, "shuffled")[0]
        return record

    def generator(self, parameters: Tree) -> Generator:
        tokenizer = self.layout.tokenizer
        return Generator(self.config, parameters, self.ops, self.layout.context_id, [tokenizer.id_of("<|end|>")], tokenizer.id_of("<pad>"))

    def _prompt(self, item: EvaluationItem, image: np.ndarray | None) -> Prompt:
        dialog = Dialog("", False, ((item.question, ""),), None if image is None else image.shape[:2], {})
        ids = self.layout.dialog(dialog)[0][:-1]  # without <|end|>: the answer begins here
        return Prompt(np.array(ids, np.int32), None if image is None else tile_image(image, self._tiling))

    def answers(self, generator: Generator, items: Sequence[EvaluationItem], pictures: str, new_tokens: int) -> list[str]:
        """Generated answers. pictures: 'picture', 'none' (the question alone) or 'shuffled' (somebody else's picture)."""
        images: list[np.ndarray | None] = [item.image for item in items]
        if pictures == "none":
            images = [None] * len(items)
        elif pictures == "shuffled":
            images = images[7:] + images[:7]
        prompts = [self._prompt(item, image) for item, image in zip(items, images, strict=True)]
        slots = 64
        while slots < max(len(p.ids) for p in prompts):
            slots += 16
        tiles = max((0 if p.tiles is None else len(p.tiles)) for p in prompts)
        out = []
        for first in range(0, len(prompts), ROWS):
            part = prompts[first : first + ROWS]
            padded = [*part, *[part[-1]] * (ROWS - len(part))]
            made = generator(padded, new_tokens, slots=slots, tiles=tiles)[: len(part)]
            out += [self.layout.tokenizer.decode(ids.tolist()) for ids in made]
        return out

    def score(self, generator: Generator, pictures: str) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
        """({task: {exact, n}}, examples for the gallery): exact match in percent; `exact_<split>` where a task has several splits."""
        scores, gallery = {}, []
        for task, items in self.sets.items():
            answers = self.answers(generator, items, pictures, ANSWER_TOKENS.get(task, 8))
            right = [exact(answer, item.answer) for answer, item in zip(answers, items, strict=True)]
            splits = sorted({str(item.meta["split"]) for item in items})
            scores[task] = {"exact": 100.0 * float(np.mean(right)), "n": len(items)}
            for split in splits if len(splits) > 1 else ():
                of_split = [ok for ok, item in zip(right, items, strict=True) if item.meta["split"] == split]
                scores[task][f"exact_{split}"] = 100.0 * float(np.mean(of_split))
            wrong = [i for i, ok in enumerate(right) if not ok][: GALLERY // 2]
            chosen = wrong + [i for i, ok in enumerate(right) if ok][: GALLERY - len(wrong)]
            gallery += [{"task": task, "index": i, "answer": answers[i], "right": bool(right[i])} for i in chosen]
        return scores, gallery

    def perplexity(self, graphdef: Any, parameters: Tree) -> dict[str, float]:
        """Perplexity of held-out prose and of scenes told in words, text alone."""
        step = self._compiled.setdefault("eval", make_eval_step(graphdef, self.ops))
        result = {}
        for kind, batches in self._text.items():
            sums = [jax.device_get(step(parameters, batch)) for batch in batches]
            result[kind] = float(np.exp(sum(float(s["nll"]) for s in sums) / sum(float(s["weight"]) for s in sums)))
        return result

    def text_logits_digest(self, graphdef: Any, parameters: Tree) -> str:
        """SHA-256 of the float32 logits of fixed held-out text, always from the same compiled function."""
        if "logits" not in self._compiled:

            def logits(parameters: Tree, batch: dict[str, jax.Array]) -> jax.Array:
                model = nnx.merge(graphdef, parameters)
                hidden, _ = model(batch, self.ops)
                return jnp.where(batch["segment_ids"][..., None] > 0, model.logits(hidden, self.ops), 0)

            self._compiled["logits"] = jax.jit(logits)
        batch = {k: self._text["told"][0][k] for k in ("tokens", "positions", "segment_ids")}
        return _digest(self._compiled["logits"](parameters, batch))


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(jax.device_get(array)).tobytes()).hexdigest()


def frozen_guarantee(records: dict[str, dict[str, Any]], trained: dict[str, frozenset[str]]) -> dict[str, dict[str, Any]]:
    """Per stage: did every leaf outside `trained[stage]` keep its SHA-256 since the stage before, and are text logits those of S0?

    Experts copied between two stages are not compared (they were not frozen, they were made).
    """
    result: dict[str, dict[str, Any]] = {}
    names = list(records)
    for before, stage in itertools.pairwise(names):
        old, new = records[before]["leaf_sha256"], records[stage]["leaf_sha256"]
        frozen = [path for path in new if path not in trained[stage]]
        result[stage] = {
            "frozen_leaves": len(frozen),
            "changed": [path for path in frozen if old[path] != new[path]],
            "text_logits_as_S0": records[stage]["text_logits_sha256"] == records[names[0]]["text_logits_sha256"],
        }
    return result
