"""What all ablations share: sizes, the model, the lessons of each stage, and how a model is scored.

The pictures and texts are those of `monovl demo` (docs/demo.md): drawings, digits and words in tiles of 32 px, 4 visual tokens each.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monovl_jax.config import DecoderConfig, Experts, ModelConfig, RopeConfig, VisionConfig
from monovl_jax.data.packing import Example, PackSpec, plan_packs
from monovl_jax.data.pipeline import Part, assemble, one_pass
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.demo.lessons import LESSONS as DEMO_LESSONS
from monovl_jax.demo.lessons import Lesson
from monovl_jax.demo.materials import Dice
from monovl_jax.demo.source import DialogSource, Layout, WorldSource
from monovl_jax.demo.text import build_tokenizer
from monovl_jax.demo.world import Dialog, World
from monovl_jax.model import Ops
from monovl_jax.recipes.feed import Feed
from monovl_jax.training.stages import Stage
from monovl_jax.training.step import make_eval_step
from monovl_jax.training.trainable import Tree
from pallas_kernels import Implementation

SAMPLES = 1 << 18
"""Samples of a lesson before it repeats; more than any stage reads."""

NOISE = 0.4
"""Share of the samples of a noisy lesson whose text belongs to another picture."""

TASKS = ("single", "digits", "scene_what", "scene_count", "scene_colour", "scene_there", "words")
"""Held-out questions that make up the visual score; captions are scored beside it."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is. The same experiments run at any size.

    steps: optimizer steps of one unit; a stage of an experiment lasts a multiple of it. rows, row_tokens, row_tiles: of a batch.
    seeds: scored. tuning_seed: where learning rates are chosen, not scored. questions: per task. folder: of results, below
    experiments/results. text_steps, text_rate: of stage 0, the language model that everything starts from. implementation: `model.Ops`.
    """

    folder: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    steps: int
    text_steps: int
    rows: int
    row_tokens: int = 160
    row_tiles: int = 16
    questions: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    text_rate: float = 2e-3
    implementation: Implementation | None = None

    def model(self, vocab_size: int, experts: Experts, attention_output: bool = True) -> ModelConfig:
        """The model of this size."""
        return ModelConfig(
            vision=VisionConfig(hidden_size=self.hidden_size, patch_size=8, tile_size=32, position_image_size=32),
            decoder=DecoderConfig(
                vocab_size=vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                rope=RopeConfig(theta=10_000.0),
                max_position_embeddings=1024,
                experts=experts,
                attention_expert_output=attention_output,
            ),
            template="compact",
            max_tiles=6,
            use_thumbnail=False,
        )


SIZES = {
    "cpu": Size("ablations", 128, 256, 4, 4, 2, steps=100, text_steps=350, rows=8),
    "10x": Size("ablations_10x", 320, 1024, 8, 8, 4, steps=400, text_steps=1500, rows=32),
    "toy": Size("ablations_toy", 16, 16, 1, 2, 1, steps=1, text_steps=1, rows=2, questions=3, seeds=(0, 1), implementation="reference"),
}
"""cpu: 1-3 million parameters, two cores. 10x: an accelerator. toy: for the tests."""


_PICTURES = (("scene", 0.6), ("digit", 0.2), ("word", 0.1), ("single", 0.1))
_ONE_TILE = (("scene", 0.5), ("digit", 0.3), ("word", 0.2))
LESSONS: Mapping[str, Lesson] = {
    lesson.name: lesson
    for lesson in (
        DEMO_LESSONS["language"],
        DEMO_LESSONS["text_mix"],
        Lesson("noisy", _ONE_TILE, "name", tiles=1, objects=1, letters=(1, 2), lines=1, real_words=0.0),
        Lesson("clean", _PICTURES, "caption", objects=3, letters=(2, 4), lines=1, real_words=0.0),
        Lesson("tasks", _PICTURES, captions=0.15, turns=3, objects=3, letters=(2, 4), lines=1, weights=(1.0, 1.0, 1.0, 1.0, 1.0)),
        Lesson("instruction", _PICTURES, captions=0.0, turns=2, objects=3, letters=(2, 4), lines=1),
    )
}
"""noisy: alt text of one thing, too often of another picture. clean: captions. tasks: questions and captions. instruction: questions."""

NOISY = frozenset({"noisy"})


class NoisySource(WorldSource):
    """A lesson in which the share NOISE of the pictures carries the text of another one, as alt text does."""

    def _text(self, index: int) -> Dialog:
        dialog = self.world.dialog(self.lesson, self.split, self.seed, index)
        if Dice("noise", self.seed, self.lesson.name, index).random() >= NOISE:
            return dialog
        other = self.world.dialog(self.lesson, self.split, self.seed, (index + 1) % self.count)
        return dataclasses.replace(dialog, turns=other.turns)

    def length(self, index: int) -> tuple[int, int]:
        dialog = self._text(index)
        return len(self.layout.dialog(dialog)[0]), self.layout.tiles(dialog.image_size)

    def __getitem__(self, index: int) -> Example:
        ids, supervised = self.layout.dialog(self._text(index))
        return Example(np.array(ids, np.int32), np.array(supervised, np.float32), super().__getitem__(index).tiles)


class _Questions:
    """Held-out questions as a source: sample i is question i."""

    def __init__(self, examples: list[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def length(self, index: int) -> tuple[int, int]:
        return len(self._examples[index].ids), len(self._examples[index].tiles)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class Setting:
    """The world, the tokens, the data of every stage and the scores, at one size. world: one that is there already (3 s to make)."""

    def __init__(self, size: Size, world: World | None = None):
        self.size, self.ops, self.world = size, Ops(implementation=size.implementation), world or World()
        with tempfile.TemporaryDirectory() as folder:
            build_tokenizer(folder)
            self.tokenizer = Tokenizer.from_folder(folder)
        vision = self.config("none").vision
        self.layout = Layout(self.tokenizer, vision.tile_size, vision.tokens_per_tile)
        self._tiling = TilingConfig(tile_size=vision.tile_size, max_tiles=6, use_thumbnail=False)
        self._compiled: dict[Any, Any] = {}
        self._prepare_questions()
        self._text = {kind: self._text_batches(kind) for kind in ("prose", "told")}

    def config(self, experts: Experts, attention_output: bool = True) -> ModelConfig:
        return self.size.model(self.tokenizer.vocab_size, experts, attention_output)

    @functools.cached_property
    def digest(self) -> str:
        """Identifies lessons, samples and scoring, so that runs on other data are never mixed in."""
        said = hashlib.sha256(repr((sorted(LESSONS.items()), NOISE, TASKS, self.size.questions, self.tokenizer.fingerprint())).encode())
        for name in sorted(LESSONS):
            source = self.source(name, 0)
            for index in range(8):
                said.update(source[index].ids.tobytes() + source[index].tiles.tobytes())
        return said.hexdigest()[:16]

    # ---- data ----------------------------------------------------------------------------------------------------------------------

    def source(self, lesson: str, seed: int) -> WorldSource:
        """The samples of a lesson."""
        kind = NoisySource if lesson in NOISY else WorldSource
        return kind(self.world, LESSONS[lesson], self.layout, seed, SAMPLES)

    def feed(self, config: ModelConfig) -> Feed:
        """The data of any stage whose mixture names LESSONS; the order depends on `Stage.seed` alone."""

        def parts(stage: Stage, mixture: Mapping[str, float], tokens: int, tiles: int) -> list[Part]:
            del tokens, tiles
            return [Part(self.source(name, stage.seed), weight, name) for name, weight in mixture.items()]

        return Feed(config.vision, self.layout.context_id, parts, window=512)

    # ---- scores --------------------------------------------------------------------------------------------------------------------

    def _example(self, image: np.ndarray, question: str, answer: str) -> Example:
        ids, supervised = self.layout.dialog(Dialog("", False, ((question, answer),), image.shape[:2], {}))
        return Example(np.array(ids, np.int32), np.array(supervised, np.float32), tile_image(image, self._tiling))

    def _prepare_questions(self) -> None:
        sets = self.world.evaluation_sets(self.size.questions)
        self._task_of, examples = [], []
        for task in (*TASKS, "captions"):
            for item in sets[task][: self.size.questions]:
                self._task_of.append(task)
                examples.append(self._example(item.image, item.question, item.answer))
        vision = self.config("none").vision
        spec = PackSpec(256, 28, vision.tokens_per_tile, vision.tile_size, self.layout.context_id)
        source = _Questions(examples)
        packs, rows = plan_packs(np.array([source.length(i) for i in range(len(source))]), spec), 8
        self._batches: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        for first in range(0, len(packs), rows):
            here = packs[first : first + rows]
            batch, _ = assemble([[source[int(i)] for i in pack] for pack in here], spec, rows)
            number = np.full(batch["tokens"].shape, -1)
            for row, pack in enumerate(here):
                inside = batch["segment_ids"][row] > 0
                number[row, inside] = pack[batch["segment_ids"][row, inside] - 1]
            self._batches.append((batch, np.where(batch["loss_weights"] > 0, number, -1)))

    def scenes(self, count: int) -> tuple[dict[str, jax.Array], np.ndarray]:
        """Held-out scenes with a question, one a row: a batch, and bool[B, T] of the text after the picture."""
        items = self.world.evaluation_sets(count)["scene_what"]
        examples = [self._example(item.image, item.question, item.answer) for item in items[:count]]
        vision = self.config("none").vision
        tiles = len(examples[0].tiles)
        spec = PackSpec(max(len(e.ids) for e in examples), tiles, vision.tokens_per_tile, vision.tile_size, self.layout.context_id)
        batch, _ = assemble([[example] for example in examples], spec, len(examples))
        after = np.maximum.accumulate(batch["token_types"] == 1, axis=1) & (batch["token_types"] == 0)
        return {key: jnp.asarray(value) for key, value in batch.items()}, after

    def _text_batches(self, kind: str) -> list[dict[str, np.ndarray]]:
        spec = PackSpec(128, 0, self.layout.visual_tokens_per_tile, self.layout.tile_size, self.layout.context_id)
        dialogs = self.world.held_out_text(kind, max(4, self.size.questions))
        source = DialogSource([d for d in dialogs if len(self.layout.dialog(d)[0]) <= spec.tokens], self.layout)
        keys = ("tokens", "positions", "segment_ids", "targets", "loss_weights")
        return [{k: batch[k] for k in keys} for batch in one_pass(source, spec, 16)]

    def _token_outcomes(self, graphdef: Any, parameters: Tree, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(is the likeliest next token the target, -log p(target)), [B, T] each."""
        model = nnx.merge(graphdef, parameters)
        hidden, _ = model(dict(batch), self.ops)
        logits = model.logits(hidden, self.ops)
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.argmax(logits, axis=-1) == batch["targets"], jax.nn.logsumexp(logits, axis=-1) - chosen

    def _jitted(self, kind: str, graphdef: Any) -> Any:
        """Compiled once per model."""
        key = (kind, graphdef)
        if key not in self._compiled:
            if kind == "text":
                self._compiled[key] = make_eval_step(graphdef, self.ops)
            else:
                self._compiled[key] = jax.jit(lambda parameters, batch: self._token_outcomes(graphdef, parameters, batch))
        return self._compiled[key]

    def visual_scores(self, graphdef: Any, parameters: Tree) -> dict[str, float]:
        """Exact match per task in percent; `visual`, their mean; `answer_nll`, nats per answer token.

        An answer is right when every one of its tokens, the end included, is the likeliest after the right ones before it: exactly then
        greedy generation says it too, at the price of one forward pass.
        """
        right = np.ones(len(self._task_of), bool)
        total = np.zeros(len(self._task_of))
        count = np.zeros(len(self._task_of))
        step = self._jitted("questions", graphdef)
        for batch, number in self._batches:
            hit, nll = jax.device_get(step(parameters, batch))
            asked = number >= 0
            np.logical_and.at(right, number[asked], hit[asked])
            np.add.at(total, number[asked], nll[asked])
            np.add.at(count, number[asked], 1)
        tasks = np.array(self._task_of)
        scores = {task: 100.0 * float(right[tasks == task].mean()) for task in dict.fromkeys(self._task_of)}
        asked = tasks != "captions"
        scores["visual"] = float(np.mean([scores[task] for task in TASKS]))
        scores["answer_nll"] = float(total[asked].sum() / count[asked].sum())
        scores["caption_nll"] = float(total[~asked].sum() / count[~asked].sum())
        return scores

    def text_scores(self, graphdef: Any, parameters: Tree) -> dict[str, float]:
        """`prose` and `told`: mean nats per token of held-out text, the logarithm of the perplexity."""
        step, scores = self._jitted("text", graphdef), {}
        for kind, batches in self._text.items():
            sums = [jax.device_get(step(parameters, batch)) for batch in batches]
            scores[kind] = float(sum(float(s["nll"]) for s in sums) / sum(float(s["weight"]) for s in sums))
        return scores


def folder_of(size: Size, device: str, results: Path) -> Path:
    """Where the results of a size lie, by kind of device: those of an accelerator apart from those of the CPU."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower())
    return results / (size.folder if name == "cpu" else f"{size.folder}_{name}")


def selected(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """`names` in the order of `known`, all of them when empty. Raises ValueError for one that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no experiment is called {unknown[0]!r}; known: {', '.join(known)}")
    return [name for name in known if not names or name in names]
