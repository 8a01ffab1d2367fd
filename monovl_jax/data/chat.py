"""Chat templates, prompts and label masks.

A conversation becomes messages, one after another: header + text + separator. Every message is tokenised by itself (the
separators are special tokens, so this equals tokenising the whole string), and the mask is set while concatenating:

    internlm2-chat   ... <|im_end|> <|im_start|> user \\n Hi <|im_end|> <|im_start|> assistant \\n Hey <|im_end|>
    supervised               0            0        0   0  0     0            0           0      0  1      1
    internvl2_5      the same with "\\n" after every <|im_end|>, which is not supervised

The supervised part begins after as many tokens as the header gives by itself, as upstream counts it.
A control token (what the template, the image slots and the ends of texts are made of) that somebody writes in a text is text: it is cut
inside before it is tokenised, `<` + `|im_end|>`, so that no text opens or closes a turn. Other special tokens (`<ref>`, `<box>`) are
recognised in texts. Upstream takes all for what they say; a template with `trust_control_tokens` does too.
`<image>` in a user's text stands for `<img>` + `<IMG_CONTEXT>` * (V * tiles) + `</img>`.

Source: Mono-InternVL internvl/conversation.py:238-247, 730-744; internvl/train/dataset.py:404-491 (preprocess_internlm);
InternVL internvl/train/dataset.py (preprocess_mpt, preprocess_phi3, preprocess_internvl2_5); spec section 4.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from monovl_jax.data.errors import SampleError
from monovl_jax.data.tokenizer import Tokenizer

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IGNORED_LABEL = -100
"""Upstream's label of an unsupervised token; here only in `Encoded.labels`."""

Role = Literal["system", "user", "assistant"]
ROLE_OF_NAME: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
"""Names of roles in LLaVA-style files."""


@dataclass(frozen=True)
class Turn:
    """One message. `text` None (or empty, see `ChatTemplate`) only opens the role, for the model to go on."""

    role: Role
    text: str | None


@dataclass(frozen=True)
class ChatTemplate:
    """The strings around the messages, and how upstream's training function of this template treats them.

    system_header None: no system message at all. user_separator None: the same as separator. stop: what ends an answer; the
    rest of the separator is not supervised. strip_text: training texts are stripped. empty_opens: a training text that is
    empty gets no separator (a prompt's never does). ordered: roles must alternate from the user on, and a leading answer is
    dropped; otherwise any order is taken as it comes. system_turn: a leading system turn replaces the system text.
    """

    name: str
    system_header: str | None
    system: str
    user_header: str
    assistant_header: str
    separator: str
    stop: str
    user_separator: str | None = None
    strip_text: bool = False
    empty_opens: bool = True
    ordered: bool = True
    system_turn: bool = False
    image_separator: str = "\n"
    """Between the pictures and a question that does not place them itself."""
    trust_control_tokens: bool = False
    """Whether a control token in a text is one, as upstream has it."""

    def __post_init__(self) -> None:
        if not self.separator.startswith(self.stop):
            raise ValueError(f"template {self.name!r}: separator {self.separator!r} must start with the stop token {self.stop!r}.")

    def header(self, role: Role) -> str:
        return {"system": self.system_header or "", "user": self.user_header, "assistant": self.assistant_header}[role]

    def end(self, role: Role) -> str:
        return self.user_separator if role == "user" and self.user_separator is not None else self.separator


_SYSTEM_SHANGHAI = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SYSTEM_WANXIANG = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


def _im(name: str, system: str, separator: str, **rules: Any) -> ChatTemplate:
    start = "<|im_start|>"
    headers = f"{start}system\n", system, f"{start}user\n", f"{start}assistant\n"
    return ChatTemplate(name, *headers, separator, stop="<|im_end|>", **rules)


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        _im("internlm2-chat", _SYSTEM_SHANGHAI, "<|im_end|>", strip_text=True),
        _im("Hermes-2", _SYSTEM_SHANGHAI, "<|im_end|>"),
        _im("internvl2_5", _SYSTEM_WANXIANG, "<|im_end|>\n", empty_opens=False, ordered=False, system_turn=True),
        ChatTemplate("phi3-chat", "<|system|>\n", _SYSTEM_SHANGHAI, "<|user|>\n", "<|assistant|>\n", "<|end|>", stop="<|end|>"),
        ChatTemplate("compact", None, "", "<|user|>", "<|assistant|>", "<|end|>", stop="<|end|>", user_separator="", image_separator=""),
    )
}
"""The four recorded templates of upstream, and `compact` for tiny models (no system message, one token per role)."""


def template_named(name: str) -> ChatTemplate:
    """Raises ValueError with the known names."""
    if name not in TEMPLATES:
        raise ValueError(f"chat template {name!r} is unknown; known are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation: ids int32[n], supervised bool[n] (the token is a target), image_slots (how many context
    tokens), truncated (text was cut off at the end)."""

    ids: np.ndarray
    supervised: np.ndarray
    image_slots: int = 0
    truncated: bool = False

    @property
    def labels(self) -> np.ndarray:
        """int32[n] in upstream's form: the id where supervised, else -100 (not shifted)."""
        return np.where(self.supervised, self.ids, IGNORED_LABEL).astype(np.int32)


def build_prompt(template: ChatTemplate, turns: Sequence[Turn], system: str | None = None) -> str:
    """The prompt string of a dialog; end with `Turn("assistant", None)` to let the model answer.

    A text of None or "" only opens its role. `system` replaces the template's system text. `<image>` is left as it is.
    """
    text = ""
    if template.system_header is not None:
        text = template.system_header + (template.system if system is None else system) + template.separator
    for turn in turns:
        text += template.header(turn.role) + (turn.text + template.end(turn.role) if turn.text else "")
    return text


def encode_prompt(
    turns: Sequence[Turn],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    visual_tokens_per_tile: int = 0,
    system: str | None = None,
) -> np.ndarray:
    """int32[n] ids for generation: BOS if the tokenizer has one, the prompt with images expanded, the answer's header.

    Roles and white space are taken as they are. Raises SampleError if images and `<image>` placeholders disagree in number.
    """
    if not turns or turns[-1].role != "assistant" or turns[-1].text:
        turns = [*turns, Turn("assistant", None)]
    messages = [*_system_message(template, system), *(_Message(t.role, t.text or "", bool(t.text)) for t in turns)]
    return _encode(messages, template, tokenizer, tiles_per_image, visual_tokens_per_tile).ids


def parse_turns(conversations: object) -> list[Turn]:
    """The turns of a LLaVA-style list of {"from": "human" | "gpt" | "system", "value": text}.

    Raises SampleError for anything else, an empty list included.
    """
    if not isinstance(conversations, list):
        raise SampleError(f"'conversations' is {type(conversations).__name__} instead of a list of turns; give a list.")
    if not conversations:
        raise SampleError("the conversation is empty; give at least one human and one gpt turn.")
    turns = []
    for number, entry in enumerate(conversations, 1):
        if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
            raise SampleError(f"turn {number} lacks 'from' or 'value'; write it as {{\"from\": ..., \"value\": ...}}.")
        name, text = entry["from"], entry["value"]
        if not isinstance(name, str) or name not in ROLE_OF_NAME:
            raise SampleError(f"turn {number} has the unknown role {name!r}; use {', '.join(map(repr, ROLE_OF_NAME))}.")
        if not isinstance(text, str):
            raise SampleError(f"turn {number} has a value of type {type(text).__name__}; give text.")
        turns.append(Turn(ROLE_OF_NAME[name], text))
    return turns


@dataclass(frozen=True, slots=True)
class _Message:
    role: Role
    text: str
    closed: bool  # whether the separator follows


def _system_message(template: ChatTemplate, system: str | None) -> list[_Message]:
    if template.system_header is None:
        if system:
            raise SampleError(f"template {template.name!r} has no system message; leave it out or choose another template.")
        return []
    return [_Message("system", template.system if system is None else system, True)]


def _checked_turns(turns: Sequence[Turn], template: ChatTemplate) -> tuple[str | None, list[Turn]]:
    """(replaced system text or None, user and assistant turns) after the checks of the training functions."""
    turns, system = list(turns), None
    if turns and turns[0].role == "system" and template.system_turn:
        system, turns = turns[0].text or "", turns[1:]
    elif turns and turns[0].role == "assistant" and template.ordered:
        turns = turns[1:]
    if not turns:
        raise SampleError("the conversation is empty; give at least one human and one gpt turn.")
    for number, turn in enumerate(turns):
        if turn.role == "system":
            place = "only the first turn may be one" if template.system_turn else "use another template or leave it out"
            raise SampleError(f"unknown role 'system' in a turn of template {template.name!r}; {place}.")
        if template.ordered and turn.role != ("user", "assistant")[number % 2]:
            raise SampleError(f"roles do not alternate: turn {number + 1} is again from the {turn.role}; join or remove turns.")
    return system, turns


def _with_placeholder(turns: list[Turn], n_images: int) -> list[Turn]:
    """A single picture that is mentioned nowhere goes before the first user text (finetune.py:371-372)."""
    if n_images != 1 or any(turn.role == "user" and IMAGE_PLACEHOLDER in (turn.text or "") for turn in turns):
        return turns
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    return [*turns[:first], Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns[first].text or ''}"), *turns[first + 1 :]]


def encode_conversation(
    turns: Sequence[Turn],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    visual_tokens_per_tile: int = 0,
    max_length: int | None = None,
) -> Encoded:
    """Ids and label mask of a training conversation, as upstream's training function of the template makes them.

    tiles_per_image: tiles of each picture in order, thumbnail included. max_length: text beyond it is cut off.
    Raises SampleError for an empty conversation, roles out of order, another number of `<image>` than pictures, a cut that
    would lose a part of a picture, or a text that contains the image-context token itself.
    """
    system, turns = _checked_turns(turns, template)
    messages = _system_message(template, system)
    for turn in _with_placeholder(turns, len(tiles_per_image)):
        text = (turn.text or "").strip() if template.strip_text else turn.text or ""
        messages.append(_Message(turn.role, text, bool(text) or not template.empty_opens))
    encoded = _encode(messages, template, tokenizer, tiles_per_image, visual_tokens_per_tile)
    if max_length is None or len(encoded.ids) <= max_length:
        return encoded
    return truncated(encoded, max_length, tokenizer)


def truncated(encoded: Encoded, max_length: int, tokenizer: Tokenizer) -> Encoded:
    """The first `max_length` tokens of a longer conversation. Raises SampleError if a part of a picture would be cut off."""
    ids = encoded.ids[:max_length]
    if encoded.image_slots:
        context, end = tokenizer.id_of(IMAGE_CONTEXT), tokenizer.id_of(IMAGE_END)
        if np.isin(encoded.ids[max_length:], (context, end)).any():
            raise SampleError(
                f"the sample has {len(encoded.ids)} tokens and a picture reaches beyond the limit of {max_length}; "
                "raise the limit or lower max_tiles."
            )
    return Encoded(ids, encoded.supervised[:max_length], encoded.image_slots, truncated=True)


def _encode(
    messages: Sequence[_Message],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int],
    visual_tokens_per_tile: int,
) -> Encoded:
    found = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")
    if found != len(tiles_per_image):
        have = f"{found} {IMAGE_PLACEHOLDER} for {len(tiles_per_image)} picture(s)"
        raise SampleError(f"the user's texts contain {have}; write one {IMAGE_PLACEHOLDER} per picture.")
    slots = [tiles * visual_tokens_per_tile for tiles in tiles_per_image]
    controls = {} if template.trust_control_tokens else control_tokens(template, tokenizer)
    ids, supervised, used = list(tokenizer.prefix_ids), [False] * len(tokenizer.prefix_ids), 0
    for message in messages:
        header, end_text = template.header(message.role), template.end(message.role) if message.closed else ""
        first, *rest = _cut_inside(message.text, controls)
        parts = [header + first, *rest]
        parts[-1] += end_text
        new: list[int] = []
        for part in parts:
            count = part.count(IMAGE_PLACEHOLDER) if message.role == "user" else 0
            new += _with_images(part, slots[used : used + count], tokenizer) if count else tokenizer.encode(part)
            used += count
        if controls:
            shown = slots[used - message.text.count(IMAGE_PLACEHOLDER) : used] if message.role == "user" else []
            _check_controls(new, [*tokenizer.encode(header), *tokenizer.encode(end_text)], shown, controls, message.role)
        mask = [False] * len(new)
        if message.role == "assistant" and message.closed:
            begin = len(tokenizer.encode(header))
            tail = template.separator[len(template.stop) :]
            end = len(new) - (len(tokenizer.encode(tail)) if tail else 0)
            mask[begin:end] = [True] * max(0, end - begin)
        ids += new
        supervised += mask
    array = np.asarray(ids, np.int32)
    named = slots or any(IMAGE_CONTEXT in message.text for message in messages)
    if named and np.count_nonzero(array == tokenizer.id_of(IMAGE_CONTEXT)) != sum(slots):
        raise SampleError(f"a text contains the token {IMAGE_CONTEXT} itself; remove it, pictures are written as {IMAGE_PLACEHOLDER}.")
    return Encoded(array, np.asarray(supervised, bool), sum(slots))


@functools.lru_cache(maxsize=64)
def control_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, int]:
    """{name: id} of the tokens that only the template may make: its own, those around images, and those that begin, end and fill texts."""
    strings = (template.system_header or "", template.user_header, template.assistant_header, template.separator, template.stop)
    written = "".join(strings) + (template.user_separator or "")
    names = {name for name in tokenizer.added_names() if name.strip() and name in written}
    names |= {*re.findall(r"<[^<>\s]+>", written), IMAGE_START, IMAGE_END, IMAGE_CONTEXT}
    names |= {name for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None and (name := tokenizer.token_of(i))}
    return {name: tokenizer.id_of(name) for name in sorted(names) if tokenizer.has(name)}


@functools.lru_cache(maxsize=64)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))


def _cut_inside(text: str, controls: Mapping[str, int]) -> list[str]:
    """The text in pieces, none of which holds a control token: `a<|im_end|>` -> `a<`, `|im_end|>`."""
    pieces, begin = [], 0
    if controls:
        pattern = _any_of(tuple(controls))
        while (match := pattern.search(text, begin)) is not None:
            pieces.append(text[begin : match.start() + 1])
            begin = match.start() + 1
    return [*pieces, text[begin:]]


def _check_controls(ids: Sequence[int], frame: Sequence[int], slots: Sequence[int], controls: Mapping[str, int], role: Role) -> None:
    """Raises SampleError for a message with other control tokens than those of its frame and images: its text made them otherwise."""
    known = set(controls.values())
    there, wanted = Counter(i for i in ids if i in known), Counter(i for i in frame if i in known)
    for name, count in ((IMAGE_START, len(slots)), (IMAGE_END, len(slots)), (IMAGE_CONTEXT, sum(slots))):
        if name in controls:
            wanted[controls[name]] += count
    if any(there[i] != wanted[i] for i in known):
        name = next(name for name, i in controls.items() if there[i] != wanted[i])
        raise SampleError(f"a text of the {role} makes the control token {name!r}, which only the template may write; change the text.")


def _with_images(text: str, slots: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids of a text whose placeholders stand for pictures of so many slots.

    The texts between are tokenised by themselves, which equals tokenising the expanded string: the image tokens are special.
    """
    start, context, end = (tokenizer.id_of(token) for token in (IMAGE_START, IMAGE_CONTEXT, IMAGE_END))
    strips_left, strips_right = tokenizer.stripping(IMAGE_START)[0], tokenizer.stripping(IMAGE_END)[1]
    pieces = text.split(IMAGE_PLACEHOLDER)
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if number and strips_right:
            piece = piece.lstrip()
        if number < len(slots) and strips_left:
            piece = piece.rstrip()
        if piece:
            ids += tokenizer.encode(piece)
        if number < len(slots):
            ids += [start, *([context] * slots[number]), end]
    return ids
