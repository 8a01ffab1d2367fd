"""The demo's world: small pictures and plain text made from pip packages, nothing downloaded at run time.

Pictures are uint8 `[64, 64, 3]` (2 x 2 tiles of 32 px, one *place* each), `[32, 96, 3]` for words (1 x 3
tiles), or `[32, 32, 3]` (one tile):

    single  one drawing in the middle of one tile                      describe it
    scene   1-4 OpenMoji drawings, one per place, on a pastel ground   what is <place> / where is the X / how many drawings are there /
                                                                       what colour is the ground / is there a X / describe the picture
    digit   1-4 handwritten digits of scikit-learn                     which digit is it / which digit is <place>
    word    1-2 lines of letters, one letter per token column          read the word / read the <top|bottom> word

Text without pictures:

    prose   paragraphs of Python's own documentation (`pydoc_data.topics`)
    told    the same scenes told in sentences, then asked about
    drill   which names are in a list, or say it again: look-ups in the context, at nearly every token

Everything is a pure function of `(seed, split, lesson, index)`: any sample can be made alone, in any order, in any thread. What is in a
picture and what is asked (`World.plan`, `World.dialog`) costs some ten microseconds and needs no pixels, so packs of samples can be planned
from text lengths; `World.picture` draws from a second random stream.

Held out from every training split:
    pairs    1/12 of all pairs of drawings never share a training picture (split "pair")
    places   a third of the drawings never stand in one of the four places of a training picture (split "place"); scenes told in
             words put any drawing anywhere
    digits   the last 360 scans in file order: other writers
    words    a quarter of the English words of 3-6 letters; no random word equals one

    >>> world = World()
    >>> sample = world.sample(LESSONS["instruction"], "train", seed=0, index=7)
    >>> sample.image.shape, sample.turns[0]
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from monovl_jax.demo.lessons import LESSONS, SCENE_QUESTIONS, Lesson
from monovl_jax.demo.materials import (
    BASELINE,
    CELL,
    COLOURS,
    DRAWINGS,
    FONTS,
    JITTER,
    NUMBERS,
    PLACES,
    SPRITE_SIZES,
    TEST_DIGITS,
    TILE,
    Dice,
    load_digits,
    load_fonts,
    load_glyphs,
    load_sprites,
)
from monovl_jax.demo.text import OPENERS, held_out_prose, prose_paragraphs, vocabulary

SPLITS = ("train", "pair", "place")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is in a picture (or a told one). `things` maps places 0-3 to a drawing's name, a digit's index in the data set, or nothing."""

    kind: str
    tiles: int
    colour: str
    things: Mapping[int, str] = dataclasses.field(default_factory=dict)
    digits: Mapping[int, int] = dataclasses.field(default_factory=dict)  # place -> scan
    words: tuple[str, ...] = ()
    held: tuple[int, ...] = ()  # places whose drawing was never there in training


@dataclasses.dataclass(frozen=True)
class Dialog:
    """The text of a sample, without its pixels.

    context: text after <bos> and before the first question (prose, a told scene, a chart); empty for pictures.
    learn_context: whether the context is supervised too (prose).
    turns: (question, answer) pairs, verbatim: an answer that is a word of the vocabulary begins with a space.
    image_size: (height, width) in pixels, or None.
    meta: kind, places, colour ... for reports.
    """

    context: str
    learn_context: bool
    turns: tuple[tuple[str, str], ...]
    image_size: tuple[int, int] | None
    meta: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class WorldSample:
    image: np.ndarray | None  # uint8 [H, W, 3]
    context: str
    learn_context: bool
    turns: tuple[tuple[str, str], ...]
    meta: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class EvaluationItem:
    image: np.ndarray  # uint8 [H, W, 3]
    question: str
    answer: str
    meta: Mapping[str, object]


def picture_size(plan: Plan) -> tuple[int, int]:
    """(height, width) in pixels: one tile, 1 x 3 tiles for words, 2 x 2 for the rest."""
    if plan.tiles == 1:
        return TILE, TILE
    return (TILE, 3 * TILE) if plan.words else (2 * TILE, 2 * TILE)


class World:
    """Sprites, glyphs, scans and word lists, loaded once (about 3 s); read-only afterwards, so any thread may call any method."""

    def __init__(self):
        self._sprites = load_sprites()
        self._glyphs = load_glyphs()
        self._scans, self.digit_labels = load_digits()
        self._fonts = load_fonts()
        whole = set(vocabulary())  # would be one token, not letters
        words = Counter(w for p in prose_paragraphs() for w in re.findall(r"(?<![^ ])[a-z]{3,6}(?![a-z])", p))
        words = sorted(w for w in set(words) | {d for d in DRAWINGS if len(d) <= 6} if w not in whole)
        self.test_words = tuple(w for w in words if zlib.crc32(f"word|{w}".encode()) % 4 == 0)
        self.train_words = tuple(w for w in words if zlib.crc32(f"word|{w}".encode()) % 4)
        self._never = frozenset(self.test_words)
        self.colours = tuple(COLOURS)
        n = len(self.digit_labels)
        self.train_digits, self.test_digits = range(n - TEST_DIGITS), range(n - TEST_DIGITS, n)
        names = DRAWINGS
        self._pair_held = [[zlib.crc32(f"pair|{min(a, b)}|{max(a, b)}".encode()) % 12 == 0 for b in names] for a in names]
        self._place_held = [[zlib.crc32(f"place|{a}".encode()) % 12 == p for p in range(4)] for a in names]

    # ------------------------------------------------------------------------------------------------------------------ what is in it
    def _scene(self, dice: Dice, split: str, most: int, least: int = 1) -> tuple[dict[int, str], tuple[int, ...]]:
        """{place: drawing} in reading order. Every number of drawings is equally frequent.
        train: nothing held out. pair: a held-out pair, no held-out place. place: at least one held-out place.
        told: no held-out pair, any place."""
        n = dice.between(max(least, 2) if split == "pair" else least, most)
        while True:
            places, drawings = dice.draw(4, n), dice.draw(len(DRAWINGS), n)
            held_places = tuple(p for p, d in zip(places, drawings, strict=True) if self._place_held[d][p])
            held_pair = any(self._pair_held[drawings[i]][drawings[j]] for i in range(n) for j in range(i))
            wanted = {
                "train": not held_places and not held_pair,
                "pair": held_pair and not held_places,
                "place": bool(held_places),
                "told": not held_pair,
            }[split]
            if wanted:
                return {p: DRAWINGS[d] for p, d in sorted(zip(places, drawings, strict=True))}, held_places

    def _word(self, dice: Dice, lesson: Lesson) -> str:
        low, high = lesson.letters
        if dice.random() < lesson.real_words:
            return dice.choice(self.train_words)
        while True:
            word = "".join([chr(97 + dice.below(26)) for _ in range(dice.between(low, high))])
            if word not in self._never and word not in OPENERS:
                return word

    def _plan(self, dice: Dice, kind: str, lesson: Lesson, split: str) -> Plan:
        """The content of a picture of the given kind; `split` concerns scenes, digits and words of training are never the held-out ones."""
        colour = dice.choice(self.colours)
        tiles = 1 if kind == "single" else lesson.tiles
        most = 1 if tiles == 1 else lesson.objects
        if kind in ("scene", "single"):
            things, held = self._scene(dice, split if tiles > 1 else "train", most, min(lesson.fewest, most))
            return Plan(kind, tiles, colour, things=things if tiles > 1 else {0: next(iter(things.values()))}, held=held)
        if kind == "digit":
            n = dice.between(1, most)
            places = sorted(dice.draw(4, n)) if tiles > 1 else [0]
            return Plan(kind, tiles, colour, digits={p: dice.choice(self.train_digits) for p in places})
        lines = dice.between(1, lesson.lines) if tiles > 1 else 1
        return Plan(kind, tiles, colour, words=tuple(self._word(dice, lesson) for _ in range(lines)))

    def _names(self, plan: Plan) -> dict[int, str]:
        """place -> what a person would call the thing there."""
        return dict(plan.things) or {p: str(self.digit_labels[scan]) for p, scan in plan.digits.items()}

    # ---------------------------------------------------------------------------------------------------------- questions and answers
    def caption(self, plan: Plan) -> str:
        if plan.kind in ("scene", "single"):
            return ",".join(f" a {name} {PLACES[p]}" for p, name in plan.things.items()) + f" on {plan.colour}"
        if plan.kind == "digit":
            return ",".join(f" digit {d} {PLACES[p]}" for p, d in self._names(plan).items())
        return " it says " + " and ".join(f'"{w}"' for w in plan.words)

    def _name(self, plan: Plan) -> str:
        if plan.words:
            return plan.words[0]
        name = next(iter(self._names(plan).values()))
        return f" {name}" if plan.things else name

    def _ask_scene(self, dice: Dice, kind: str, plan: Plan, place: int | None) -> tuple[str, str]:
        if kind == "what":
            if place is None:
                return f"what is {PLACES[self._empty(dice, plan)]}", " nothing"
            return f"what is {PLACES[place]}", f" {plan.things[place]}"
        if kind == "where" and place is not None:
            return f"where is the {plan.things[place]}", f" a {plan.things[place]} {PLACES[place]}"
        if kind == "count":
            return "how many drawings are there", f" {NUMBERS[len(plan.things)]}"
        if kind == "colour":
            return "what colour is the ground", f" {plan.colour}"
        if place is not None:
            return f"is there a {plan.things[place]}", f" {plan.things[place]} yes"
        present = set(plan.things.values())
        while True:
            name = dice.choice(DRAWINGS)
            if name not in present:
                return f"is there a {name}", f" {name} no"

    def _ask_list(self, dice: Dice, kind: str, plan: Plan, places: list[int]) -> tuple[str, str]:
        """Several questions in one, in random order: the answer is so many look-ups for the price of one turn."""
        names, spots = [plan.things[p] for p in places], [PLACES[p] for p in places]
        if kind == "where":
            return "where is the " + " and the ".join(names), ",".join(f" a {name} {spot}" for name, spot in zip(names, spots, strict=True))
        others = [d for d in (dice.choice(DRAWINGS) for _ in range(8 - len(names))) if d not in names]
        asked = dice.shuffled([(name, "yes") for name in names] + [(d, "no") for d in dict.fromkeys(others)])
        return _ask_which(asked)

    def _empty(self, dice: Dice, plan: Plan) -> int:
        return dice.choice([p for p in range(4) if p not in plan.things])

    def _questions(self, dice: Dice, plan: Plan, lesson: Lesson, most: int) -> list[tuple[str, str]]:
        if plan.kind == "single" or plan.tiles == 1:
            return [("describe it", self._name(plan))]
        if plan.kind == "scene":
            # Different questions are about different drawings where there are enough: an earlier turn must not give a later one away.
            places = dice.shuffled(list(plan.things))
            about = {kind: places[i % len(places)] for i, kind in enumerate(("where", "what", "there"))}
            if len(places) < 4 and dice.random() < 0.15:
                about["what"] = None
            if dice.random() < 0.5:
                about["there"] = None
            keys = [dice.random() ** (1 / w) for w in lesson.weights]  # weighted order without replacement
            order = sorted(range(len(keys)), key=lambda i: -keys[i])
            turns = [self._ask_scene(dice, kind, plan, about.get(kind)) for kind in (SCENE_QUESTIONS[i] for i in order[:most])]
            for kind, share in zip(("where", "there"), lesson.lists, strict=True):
                if dice.random() < share:
                    turns.append(self._ask_list(dice, kind, plan, dice.shuffled(places)))
            return dice.shuffled(turns)
        turns = [("what colour is the ground", f" {plan.colour}")] if dice.random() < 0.2 else []
        if plan.kind == "digit":
            names = self._names(plan)
            turns += (
                [("which digit is it", d) for d in names.values()]
                if len(names) == 1
                else [(f"which digit is {PLACES[p]}", d) for p, d in names.items()]
            )
        else:
            turns += [(f"read {n} word", w) for n, w in zip(_line_names(len(plan.words)), plan.words, strict=True)]
        return dice.shuffled(turns)[:most]

    def _turns(self, dice: Dice, plan: Plan, lesson: Lesson) -> tuple[tuple[str, str], ...]:
        if lesson.style == "name" or plan.tiles == 1:
            return (("describe it", self._name(plan)),)
        described = ("describe the picture", self.caption(plan))
        if lesson.style == "both":
            return (*self._questions(dice, plan, lesson, 2), described)
        if lesson.style == "caption" or dice.random() < lesson.captions:
            return (described,)
        return tuple(self._questions(dice, plan, lesson, lesson.turns))

    # ----------------------------------------------------------------------------------------------------------------------- text only
    def _told(self, dice: Dice, split: str) -> tuple[str, Plan]:
        """Sentences in random order, each with the place before or after the thing."""
        kind = ("scene", "scene", "scene", "digit", "word")[dice.below(5)]
        plan = self._plan(dice, kind, _TOLD, "told" if split == "train" else split)
        if kind == "word":
            facts = [f'{n} word is "{w}"' for n, w in zip(_line_names(len(plan.words)), plan.words, strict=True)]
        else:
            article = "a" if kind == "scene" else "digit"
            facts = [
                f"{article} {name} {PLACES[p]}" if dice.random() < 0.5 else f"{PLACES[p]} {article} {name}"
                for p, name in self._names(plan).items()
            ]
        facts.append(f"{plan.colour} ground")
        return " " + ", ".join(dice.shuffled(facts)), plan

    def _drill(self, dice: Dice) -> tuple[str, tuple[str, str]]:
        """Looking things up in the context, with something to look up at nearly every token: which names are in a list, or say it again."""
        u = dice.random()
        if u < 0.15:
            letters = "".join([chr(97 + dice.below(26)) for _ in range(dice.between(4, 12))])
            return f"[{letters}]", ("repeat", letters)
        order = dice.draw(len(DRAWINGS), 24)
        inside, outside = order[: dice.between(3, 12)], order[12:]
        context = "[" + "".join(f" {DRAWINGS[d]}" for d in inside) + "]"
        if u < 0.35:
            return context, ("repeat", "".join(f" {DRAWINGS[d]}" for d in inside))
        asked = [
            (DRAWINGS[dice.choice(inside)], "yes") if dice.random() < 0.5 else (DRAWINGS[dice.choice(outside)], "no") for _ in range(8)
        ]
        return context, _ask_which(asked)

    # ------------------------------------------------------------------------------------------------------------------------- samples
    @staticmethod
    def _check(lesson: Lesson, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")

    def _content(self, lesson: Lesson, split: str, seed: int, index: int) -> tuple[Plan | None, Dialog]:
        self._check(lesson, split)
        dice = Dice("content", seed, split, lesson.name, index)
        u = dice.random()
        kind = next((k for k, upto in lesson._cumulative if u < upto), lesson._cumulative[-1][0])
        if kind == "prose":
            paragraphs = prose_paragraphs()
            while True:
                i = dice.below(len(paragraphs))
                if held_out_prose(i) == (split != "train"):
                    return None, Dialog(paragraphs[i], True, (), None, {"kind": "prose"})
        if kind == "drill":
            context, turn = self._drill(dice)
            return None, Dialog(context, False, (turn,), None, {"kind": "drill", "tiles": 0, "things": {}, "words": ()})
        if kind == "told":
            context, plan = self._told(dice, split)
            return None, Dialog(context, False, self._turns(dice, plan, _TOLD), None, {**self._meta(plan), "kind": kind})
        plan = self._plan(dice, kind, lesson, split)
        turns = self._turns(dice, plan, lesson)
        return plan, Dialog("", False, turns, picture_size(plan), self._meta(plan))

    def _meta(self, plan: Plan) -> dict[str, object]:
        names = {PLACES[p]: name for p, name in self._names(plan).items()}
        return {
            "kind": plan.kind,
            "tiles": plan.tiles,
            "colour": plan.colour,
            "things": names,
            "words": plan.words,
            "held": tuple(PLACES[p] for p in plan.held),
        }

    def dialog(self, lesson: Lesson, split: str, seed: int, index: int) -> Dialog:
        """The text of sample `index`, without drawing its picture."""
        return self._content(lesson, split, seed, index)[1]

    def picture(self, lesson: Lesson, split: str, seed: int, index: int) -> np.ndarray | None:
        """The picture of sample `index`, uint8 [H, W, 3]; None for text."""
        plan, _ = self._content(lesson, split, seed, index)
        return None if plan is None else self._draw(plan, Dice("pixels", seed, split, lesson.name, index))

    def sample(self, lesson: Lesson, split: str = "train", seed: int = 0, index: int = 0) -> WorldSample:
        """Sample `index` of a lesson: the same for the same arguments, whatever was asked before."""
        plan, dialog = self._content(lesson, split, seed, index)
        image = None if plan is None else self._draw(plan, Dice("pixels", seed, split, lesson.name, index))
        return WorldSample(image, dialog.context, dialog.learn_context, dialog.turns, dialog.meta)

    # ------------------------------------------------------------------------------------------------------------------------- pixels
    def _draw(self, plan: Plan, dice: Dice, natural: bool = False) -> np.ndarray:
        """Things never overlap, so each is laid on the plain ground alone: ground * (1 - opacity) + colour * opacity."""
        height, width = picture_size(plan)
        ground = np.array([min(255.0, max(0.0, c + dice.uniform(-9, 9))) for c in COLOURS[plan.colour]], np.float32)
        image = np.empty((height, width, 3), np.uint8)
        image.reshape(height, -1)[:] = np.tile(ground.astype(np.uint8), width)  # ten times faster than broadcasting three bytes
        for place, name in plan.things.items():
            colour, keep = self._sprites[name][dice.below(len(SPRITE_SIZES))]
            self._spot(image, dice, place if plan.tiles > 1 else 0, *keep.shape[:2])[:] = ground * keep + colour
        for place, scan in plan.digits.items():
            mask = dice.choice(self._scans[scan])
            self._spot(image, dice, place if plan.tiles > 1 else 0, *mask.shape[:2])[:] = ground + (self._ink(dice) - ground) * mask
        if plan.words:
            self._write(image, ground, plan, dice, natural)
        return image

    @staticmethod
    def _ink(dice: Dice) -> np.ndarray:
        return np.array([dice.uniform(0, 90) for _ in range(3)], np.float32)

    @staticmethod
    def _spot(image: np.ndarray, dice: Dice, place: int, height: int, width: int) -> np.ndarray:
        """The part of the picture for a thing of this size: the middle of its place, give or take JITTER."""
        corner = []
        for start, size in ((place // 2 * TILE, height), (place % 2 * TILE, width)):
            corner.append(start + min(max((TILE - size) // 2 + dice.between(-JITTER, JITTER), 0), TILE - size))
        y, x = corner
        return image[y : y + height, x : x + width]

    def _write(self, image: np.ndarray, ground: np.ndarray, plan: Plan, dice: Dice, natural: bool) -> None:
        (tall, wide), ink = image.shape[:2], self._ink(dice)
        half = dice.below(2) if len(plan.words) == 1 else 0
        for line, word in enumerate(plan.words):
            font = dice.below(len(FONTS))
            mask = self._natural(word, font) if natural else np.concatenate([self._glyphs[font][ord(c) - 97] for c in word], 1)
            height, width = mask.shape[:2]
            y = (line + half) * CELL + dice.between(-1, 1)
            y = min(max(y, 0), tall - height)
            x = dice.below((wide - width) // CELL + 1) * CELL + dice.between(-1, 1)  # on the token grid, give or take a pixel
            x = min(max(x, 0), wide - width)
            image[y : y + height, x : x + width] = ground + (ink - ground) * mask

    def _natural(self, word: str, font: int) -> np.ndarray:
        """[height, width, 1]: the word with the font's own spacing, made narrower where it would not fit."""
        from PIL import Image, ImageDraw

        width, height = int(self._fonts[font].getlength(word)) + 2, CELL
        strip = Image.new("L", (width, height), 0)
        ImageDraw.Draw(strip).text((1, BASELINE), word, fill=255, font=self._fonts[font], anchor="ls")
        if width > 3 * TILE:
            strip = strip.resize((3 * TILE, height), Image.Resampling.LANCZOS)
        return np.asarray(strip, np.float32)[..., None] / 255

    # -------------------------------------------------------------------------------------------------------------------- evaluation
    def evaluation_sets(self, n: int = 200, seed: int = 1234) -> dict[str, list[EvaluationItem]]:
        """Held-out questions by task. Scene tasks: half on new pairs, half on new places (meta["split"]); digits: all 360 held-out scans.

        scene_what, scene_where, scene_count, scene_colour, scene_there, captions: n each (what, where, half of there and the place half ask
        about the drawing that is new there). words, words_natural: n unseen words. single: n one-tile pictures as taught in S1.1.
        """
        lesson = dataclasses.replace(LESSONS["instruction"], name="evaluation")
        sets: dict[str, list[EvaluationItem]] = {}

        def add(task: str, index: int, plan: Plan, question: str, answer: str, natural: bool = False, **meta) -> None:
            image = self._draw(plan, Dice("pixels", seed, task, index), natural)
            sets.setdefault(task, []).append(EvaluationItem(image, question, answer, {**self._meta(plan), **meta}))

        for kind in (*SCENE_QUESTIONS, "caption"):
            task = "captions" if kind == "caption" else f"scene_{kind}"
            for i in range(n):
                split = ("pair", "place")[i % 2]
                dice = Dice("evaluation", seed, task, i)
                plan = self._plan(dice, "scene", lesson, split)
                if kind == "caption":
                    add(task, i, plan, "describe the picture", self.caption(plan), split=split)
                    continue
                place: int | None = dice.choice(plan.held or self._paired(plan))
                if kind == "there" and i // 2 % 2:
                    place = None
                add(task, i, plan, *self._ask_scene(dice, kind, plan, place), split=split)
        for i, scan in enumerate(self.test_digits):
            dice = Dice("evaluation", seed, "digits", i)
            plan = Plan("digit", 4, dice.choice(self.colours), digits={dice.below(4): scan})
            add("digits", i, plan, "which digit is it", str(self.digit_labels[scan]), split="scan")
        words = Dice("evaluation", seed, "words").shuffled(self.test_words)
        for i in range(n):
            dice = Dice("evaluation", seed, "words", i)
            plan = Plan("word", 4, dice.choice(self.colours), words=(words[i % len(words)],))
            add("words", i, plan, "read the word", plan.words[0], split="word")
            add("words_natural", i, plan, "read the word", plan.words[0], natural=True, split="word")
            plan = self._plan(Dice("evaluation", seed, "single", i), "single", LESSONS["concept"], "train")
            add("single", i, plan, "describe it", self._name(plan), split="train")
        return sets

    def _paired(self, plan: Plan) -> list[int]:
        """Places whose drawing is one of a held-out pair."""
        index = {p: DRAWINGS.index(name) for p, name in plan.things.items()}
        return [p for p in index if any(p != q and self._pair_held[index[p]][index[q]] for q in index)]

    def held_out_text(self, kind: str, n: int = 100, seed: int = 4321) -> list[Dialog]:
        """Text never trained on, for perplexity: kind "prose" (every tenth paragraph) or "told" (new pairs of drawings)."""
        if kind == "prose":
            return [Dialog(p, True, (), None, {"kind": kind}) for i, p in enumerate(prose_paragraphs()) if held_out_prose(i)][:n]
        lesson = Lesson(f"held out {kind}", ((kind, 1.0),))
        return [self.dialog(lesson, "pair", seed, i) for i in range(n)]


_TOLD = Lesson("told", (), turns=8, lists=(0.6, 0.6))


def _line_names(n: int) -> tuple[str, ...]:
    return ("the",) if n == 1 else ("the top", "the bottom")


def _ask_which(asked: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Many "is there a" at once: "which of fox, kite" -> " fox yes, kite no"."""
    return "which of " + ", ".join(name for name, _ in asked), ",".join(f" {name} {verdict}" for name, verdict in asked)
