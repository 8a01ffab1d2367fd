"""The demo's language: prose for stage 0, the vocabulary and its tokenizer."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections import Counter

from monovl_jax.demo.materials import COLOURS, DRAWINGS, NUMBERS, PLACES

PAD, BOS, END, USER, ASSISTANT, IMG, IMG_END, IMG_CONTEXT = range(8)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<img>", "</img>", "<IMG_CONTEXT>")
OPENERS = ("what", "where", "how", "is", "which", "read", "describe", "repeat")  # first words of questions: no space before them
PIECE = r" ?[A-Za-z]+|."  # the pre-tokenizer: a word with the space before it, or one character


@functools.cache
def prose_paragraphs() -> tuple[str, ...]:
    """Running English of Python's documentation topics, without code and tables, in pieces of about 60-300 characters."""
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


def held_out_prose(index: int) -> bool:
    return index % 10 == 0


@functools.cache
def vocabulary(common_words: int = 600) -> tuple[str, ...]:
    """Special tokens, the printable characters, question openers, this world's words and the prose's commonest words (with their space)."""
    world = " ".join((*DRAWINGS, *PLACES, *COLOURS, *NUMBERS))
    world += (
        " what where how is which read describe many drawings are there colour the ground picture word middle a on digit nothing in and"
    )
    world += " it says yes no"
    words = [" " + w for w in world.split()]
    counts = Counter(
        w for i, p in enumerate(prose_paragraphs()) if not held_out_prose(i) for w in re.findall(PIECE, p) if len(w) > 2 and w[0] == " "
    )
    words += [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:common_words]]
    return tuple(dict.fromkeys((*SPECIAL_TOKENS, *(chr(c) for c in range(32, 127)), *OPENERS, *words)))


def build_tokenizer(folder: str | pathlib.Path) -> pathlib.Path:
    """Writes `tokenizer.json` (a `tokenizers` BPE without merges: a word of the vocabulary, else its characters) and a minimal
    `tokenizer_config.json` into `folder`; returns the path of the first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
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
