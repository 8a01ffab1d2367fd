"""The world's samples as a data source: the layout of the `compact` chat template, encoded directly for speed.

<bos> <|user|> <img> visual tokens </img> question <|assistant|> answer <|end|> <|user|> question ...
<bos> context <|user|> question <|assistant|> answer <|end|> ...                                    (text)
"""

from __future__ import annotations

import numpy as np

from monovl_jax.data.packing import Example
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.demo.lessons import Lesson
from monovl_jax.demo.world import Dialog, World


class Layout:
    """Ids of a dialog. One object per run; the tests hold it against `data.chat.encode_conversation`."""

    def __init__(self, tokenizer: Tokenizer, tile_size: int, visual_tokens_per_tile: int):
        self.tokenizer = tokenizer
        self.tile_size, self.visual_tokens_per_tile = tile_size, visual_tokens_per_tile
        self._bos, self._end = tokenizer.id_of("<bos>"), tokenizer.id_of("<|end|>")
        self._user, self._assistant = tokenizer.id_of("<|user|>"), tokenizer.id_of("<|assistant|>")
        self._img, self._img_end = tokenizer.id_of("<img>"), tokenizer.id_of("</img>")
        self.context_id = tokenizer.id_of("<IMG_CONTEXT>")
        self._pieces: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        ids = self._pieces.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text)
            if len(self._pieces) < 100_000:
                self._pieces[text] = ids
        return ids

    def tiles(self, size: tuple[int, int] | None) -> int:
        """Tiles of a picture of this (height, width): the world's pictures are whole tiles already."""
        return 0 if size is None else (size[0] // self.tile_size) * (size[1] // self.tile_size)

    def dialog(self, dialog: Dialog) -> tuple[list[int], list[int]]:
        """(ids, supervised): supervised are the answers with their <|end|>, and the context where it is to be learned."""
        ids, supervised = [self._bos], [0]

        def add(piece: list[int], learned: int) -> None:
            ids.extend(piece)
            supervised.extend([learned] * len(piece))

        if dialog.context:
            add(self._encode(dialog.context), int(dialog.learn_context))
            if not dialog.turns:
                add([self._end], int(dialog.learn_context))
        slots = self.tiles(dialog.image_size) * self.visual_tokens_per_tile
        for number, (question, answer) in enumerate(dialog.turns):
            add([self._user], 0)
            if number == 0 and slots:
                add([self._img, *[self.context_id] * slots, self._img_end], 0)
            add([*self._encode(question), self._assistant], 0)
            add([*self._encode(answer), self._end], 1)
        return ids, supervised


class WorldSource:
    """`count` samples of one lesson, reshuffled by the pipeline each epoch. Satisfies `data.sources.Source`."""

    def __init__(self, world: World, lesson: Lesson, layout: Layout, seed: int, count: int, split: str = "train"):
        self.world, self.lesson, self.layout = world, lesson, layout
        self.seed, self.count, self.split = seed, count, split
        self._tiling = TilingConfig(tile_size=layout.tile_size, max_tiles=6, use_thumbnail=False)

    def __len__(self) -> int:
        return self.count

    def length(self, index: int) -> tuple[int, int]:
        dialog = self.world.dialog(self.lesson, self.split, self.seed, index)
        return len(self.layout.dialog(dialog)[0]), self.layout.tiles(dialog.image_size)

    def __getitem__(self, index: int) -> Example:
        sample = self.world.sample(self.lesson, self.split, self.seed, index)
        size = None if sample.image is None else sample.image.shape[:2]
        ids, supervised = self.layout.dialog(Dialog(sample.context, sample.learn_context, sample.turns, size, sample.meta))
        side = self.layout.tile_size
        tiles = np.zeros((0, side, side, 3), np.uint8) if sample.image is None else tile_image(sample.image, self._tiling)
        return Example(np.array(ids, np.int32), np.array(supervised, np.float32), tiles)


class DialogSource:
    """A fixed list of text dialogs, for perplexity."""

    def __init__(self, dialogs: list[Dialog], layout: Layout):
        side = layout.tile_size
        empty = np.zeros((0, side, side, 3), np.uint8)
        pairs = [layout.dialog(d) for d in dialogs]
        self._examples = [Example(np.array(i, np.int32), np.array(s, np.float32), empty) for i, s in pairs]

    def __len__(self) -> int:
        return len(self._examples)

    def length(self, index: int) -> tuple[int, int]:
        return len(self._examples[index].ids), 0

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]
