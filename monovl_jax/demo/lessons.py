"""What each stage is shown and asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

SCENE_QUESTIONS = ("what", "where", "count", "colour", "there")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one stage is shown and asked.

    mixture: shares of the kinds single, scene, digit, word (pictures) and told, drill, prose (text).
    style: what is asked about a picture: "name" (one bare word), "caption", "both" (two questions, then a caption), "questions".
    captions: with style "questions", the share of pictures that are described instead.
    tiles: 1 (concept stage: one thing on one tile) or 4.
    objects, letters, lines: how much is in a picture at most; real_words: share of English words, the rest are random letters.
    fewest: drawings in a scene at least.
    turns: questions asked about one picture at most. weights: relative shares of SCENE_QUESTIONS. lists: how often all drawings
    are asked for at once beside the single questions, as "where is the fox and the cat" and as "which of fox, kite, ...".
    """

    name: str
    mixture: tuple[tuple[str, float], ...]
    style: str = "questions"
    captions: float = 0.2
    tiles: int = 4
    objects: int = 4
    fewest: int = 1
    letters: tuple[int, int] = (3, 6)
    lines: int = 2
    real_words: float = 0.3
    turns: int = 4
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    lists: tuple[float, float] = (0.0, 0.0)

    @functools.cached_property
    def _cumulative(self) -> tuple[tuple[str, float], ...]:
        total, run, out = sum(share for _, share in self.mixture), 0.0, []
        for kind, share in self.mixture:
            run += share / total
            out.append((kind, run))
        return tuple(out)


_PICTURES = (("scene", 0.50), ("digit", 0.22), ("word", 0.21), ("single", 0.07))
# Looking a thing up by its name (where, is there) forms later than everything else, so it is asked more often, and many at once;
# `look_up` asks nothing else, and "where" most of all: that cannot be answered from a mere list of what is in the picture.
_DENSE = {"weights": (1.0, 1.5, 0.7, 0.7, 1.5), "lists": (0.7, 0.7)}
LESSONS: Mapping[str, Lesson] = {
    lesson.name: lesson
    for lesson in (
        Lesson("language", (("prose", 0.15), ("drill", 0.45), ("told", 0.40))),
        Lesson(
            "concept",
            (("scene", 0.45), ("digit", 0.25), ("word", 0.30)),
            "name",
            tiles=1,
            objects=1,
            letters=(1, 2),
            lines=1,
            real_words=0.0,
        ),
        Lesson("semantic", _PICTURES, "both", objects=2, letters=(2, 4), lines=1, real_words=0.0, **_DENSE),
        Lesson("alignment", _PICTURES, captions=0.15, turns=3, **_DENSE),
        Lesson("instruction", _PICTURES, captions=0.15, turns=3, **_DENSE),
        Lesson("look_up", (("scene", 1.0),), captions=0.0, fewest=3, turns=0, lists=(1.0, 0.3)),
        Lesson("text_mix", (("prose", 0.5), ("told", 0.5))),
    )
}
