"""Text in, text out: one conversation with pictures, whose answers arrive in pieces of whole characters."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator as Stream
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from monovl_jax.config import ModelConfig
from monovl_jax.data.chat import IMAGE_PLACEHOLDER, ChatTemplate, Turn, encode_prompt
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import load_image
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.sampling import GREEDY, Sampling
from monovl_jax.inference.session import Session

Picture = str | Path | Image.Image | np.ndarray
BROKEN = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, each of which may be a token."""


@runtime_checkable
class ChatModel(Protocol):
    """What a conversation needs of a loaded model (`monovl_jax.Pretrained` has it)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> ChatTemplate: ...
    def tiling(self) -> TilingConfig: ...


class TextStream:
    """Ids in pieces to text in pieces. All pieces together are the decoded text without white space around it.

    A character of several bytes may take several tokens: its piece waits for the last of them. White space waits for what follows it.

    A byte that is part of no character becomes U+FFFD. A decoder may take the good bytes around it for broken ones too, so what follows
    the text told so far is then decoded by itself, and without the bytes that cannot become a character any more.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._first = True  # white space at the beginning of an answer is not told
        self._restart([])

    def _restart(self, ids: list[int]) -> None:
        self._ids = ids  # of the window that is decoded at once
        self._told = ""  # of the window's text
        self._good_ids, self._space = 0, ""  # how many ids are text and white space without doubt, and the white space that waits

    def feed(self, ids: np.ndarray) -> str:
        """The text that these ids complete; may be empty."""
        pieces = []
        for index in ids.tolist():
            self._ids.append(index)
            pieces.append(self._tell(LONGEST_CHARACTER))
        return "".join(pieces)

    def end(self) -> str:
        """What is left when no more ids come."""
        return self._tell(1)

    def _tell(self, patience: int) -> str:
        """patience: how many ids may be no character together before the first of them is given up."""
        whole = self._tokenizer.decode(self._ids)
        whole = whole.lstrip() if self._first else whole
        text = whole.rstrip(BROKEN).rstrip()
        grown = text[len(self._told) :] if text.startswith(self._told) else ""
        if grown or (whole.startswith(self._told) and not whole.endswith(BROKEN)):
            self._told, self._good_ids = text, len(self._ids)
            self._space = whole[len(text) :] if not whole.endswith(BROKEN) else ""
            return grown
        broken, space = self._ids[self._good_ids :], self._space
        if len(broken) < patience:
            return ""
        self._first = False
        if not text.startswith(self._told):
            self._restart(broken)
            return space + self._tell(patience)
        self._restart(broken[1:])
        return space + BROKEN + self._tell(patience)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question with the names of its pictures, and the answer."""

    question: str
    images: tuple[str, ...]
    answer: str


class Conversation:
    """A chat with a model by its template. Pictures may come with any question, or with none.

    Args:
      system: replaces the system text of the template.
      context: most tokens of the whole conversation (`Session`).
    """

    def __init__(self, model: ChatModel, generator: Generator, system: str | None = None, context: int | None = None):
        self.model, self.system = model, system
        self.session = Session(generator, context)
        self.exchanges: list[Exchange] = []

    def reset(self) -> None:
        """Forgets everything."""
        self.session.reset()
        self.exchanges = []

    def prompt(self, question: str, images: Sequence[Picture] = ()) -> tuple[str, Prompt]:
        """The question with its `<image>` placeholders (by default before it), and the ids that the conversation goes on with.

        Raises SampleError when a picture cannot be read or pictures and placeholders disagree in number.
        """
        model, template, tokenizer = self.model, self.model.template, self.model.tokenizer
        tiling = model.tiling().for_images(max(1, len(images)))
        tiles = [tile_image(load_image(Path(i)) if isinstance(i, str | Path) else i, tiling) for i in images]
        if images and IMAGE_PLACEHOLDER not in question:
            question = IMAGE_PLACEHOLDER * len(images) + template.image_separator + question
        counts, visual = [len(t) for t in tiles], model.config.vision.tokens_per_tile
        if not len(self.session.tokens):
            ids = encode_prompt([Turn("user", question)], template, tokenizer, counts, visual, self.system)
        else:
            later = dataclasses.replace(template, system_header=None)
            turn = encode_prompt([Turn("user", question)], later, tokenizer, counts, visual)[len(tokenizer.prefix_ids) :]
            ids = np.concatenate([np.asarray(tokenizer.encode(template.end("assistant")), np.int32), turn])
        return question, Prompt(ids, np.concatenate(tiles) if tiles else None)

    def ask(self, question: str, images: Sequence[Picture] = (), max_new_tokens: int = 512, sampling: Sampling = GREEDY) -> Stream[str]:
        """The answer in pieces, as it is made. Leaving the iterator stops it; what was made stays in the conversation.

        Raises SampleError as `prompt` does, empty questions included, and ContextFull when there is no room left; the conversation then
        stays as it was.
        """
        if not question.strip():
            raise SampleError("the question is empty; write what you want to know.")
        asked, prompt = self.prompt(question, images)
        text, said, before = TextStream(self.model.tokenizer), "", len(self.session.tokens)
        stream = self.session.stream(prompt, max_new_tokens, sampling, draw=len(self.exchanges))
        try:
            for ids in stream:
                if piece := text.feed(ids):
                    said += piece
                    yield piece
            if piece := text.end():
                said += piece
                yield piece
        finally:
            stream.close()
            if len(self.session.tokens) > before:  # the question was read
                names = tuple(str(i) if isinstance(i, str | Path) else "(picture in memory)" for i in images)
                self.exchanges.append(Exchange(asked, names, said))
