"""One tokenizer for the two kinds of folders: `tokenizer.json` (tokenizers) and `tokenizer.model` (sentencepiece).

The folder is read as data: no Python file in it is ever executed.

With sentencepiece the text is first split at the added tokens (the longest that starts first wins), then every stretch
between them is encoded by itself; this is what the reference's slow tokenizer does.

    "<|im_start|>user\\nHi<|im_end|>"  ->  [<|im_start|>] + pieces("user\\nHi") + [<|im_end|>]
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from monovl_jax import jsontext
from monovl_jax.data.errors import SampleError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What `save` copies, with every `tokenization_*.py` (copied for upstream's sake, never run here)."""

_CACHED_CHARACTERS, _CACHED_TEXTS = 256, 1 << 16

_LARGEST_ID, _LARGEST_FILE = 1 << 24, 1 << 29


@dataclass(frozen=True)
class AddedToken:
    """A token that is recognised in the text before everything else.

    lstrip, rstrip: it swallows white space to its left, right. single_word: only where no letter touches it.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@runtime_checkable
class _Backend(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def token_of(self, index: int) -> str | None: ...
    def size(self) -> int: ...
    def stripping(self, token: str) -> tuple[bool, bool]: ...
    def added(self) -> list[str]: ...
    def content(self) -> bytes: ...


class _JsonBackend:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._strip = {t.content: (t.lstrip, t.rstrip) for t in tokenizer.get_added_tokens_decoder().values()}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def token_of(self, index: int) -> str | None:
        return self.tokenizer.id_to_token(index)

    def size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def stripping(self, token: str) -> tuple[bool, bool]:
        return self._strip.get(token, (False, False))

    def added(self) -> list[str]:
        return list(self._strip)

    def content(self) -> bytes:
        return self.tokenizer.to_str(pretty=True).encode()


class _SentencePieceBackend:
    """A sentencepiece model with added tokens in front of it."""

    def __init__(self, model: Path, added: Iterable[AddedToken]) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.tokens = {token.content: token for token in added}
        self.by_id = {token.id: token for token in self.tokens.values()}
        names = sorted(self.tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def encode(self, text: str) -> list[int]:
        if self._split is None:
            return self.pieces.encode(text) if text else []
        parts = self._split.split(text)  # text, token, text, token, ..., text
        for at in range(1, len(parts), 2):
            token = self.tokens[parts[at]]
            if token.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
            if token.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if token.single_word and parts[at - 1] and parts[at - 1][-1] != " ":
                parts[at - 1], parts[at] = parts[at - 1] + parts[at], ""
            elif token.single_word and parts[at + 1] and parts[at + 1][0] != " ":
                parts[at + 1], parts[at] = parts[at] + parts[at + 1], ""
        ids: list[int] = []
        for at, part in enumerate(parts):
            if not part:
                continue
            if at % 2:
                ids.append(self.tokens[part].id)
            else:
                ids.extend(self.pieces.encode(part))
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text, run = [], []
        for index in ids:
            token = self.by_id.get(index)
            if token is None and index < self.pieces.get_piece_size():
                run.append(index)
            elif token is not None and not (skip_special and token.special):
                text += [self.pieces.decode(run), token.content]
                run = []
        return "".join([*text, self.pieces.decode(run)])

    def id_of(self, token: str) -> int | None:
        if token in self.tokens:
            return self.tokens[token].id
        index = self.pieces.piece_to_id(token)
        return None if index == self.pieces.unk_id() and token != self.pieces.id_to_piece(index) else index

    def token_of(self, index: int) -> str | None:
        if index in self.by_id:
            return self.by_id[index].content
        return self.pieces.id_to_piece(index) if 0 <= index < self.pieces.get_piece_size() else None

    def size(self) -> int:
        return max([self.pieces.get_piece_size() - 1, *self.by_id]) + 1

    def stripping(self, token: str) -> tuple[bool, bool]:
        entry = self.tokens.get(token)
        return (entry.lstrip, entry.rstrip) if entry else (False, False)

    def added(self) -> list[str]:
        return list(self.tokens)

    def content(self) -> bytes:
        return self.pieces.serialized_model_proto() + repr(sorted(self.by_id.items(), key=lambda item: item[0])).encode()


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.from_folder(path)` or `Tokenizer.from_tokenizers(object)`.

    bos_id, eos_id, pad_id, unk_id: int or None. prefix_ids: what the reference puts before every text (InternLM2: `<s>`).
    """

    def __init__(self, backend: _Backend, names: dict[str, str | None], prefix_ids: Sequence[int], folder: Path | None) -> None:
        self._backend, self._names, self._folder = backend, names, folder
        self._cache: dict[str, list[int]] = {}
        self.prefix_ids = tuple(prefix_ids)
        ids = {key: backend.id_of(name) if name else None for key, name in names.items()}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (ids.get(key) for key in ("bos", "eos", "pad", "unk"))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`, else `tokenizer.model` with the added tokens of the JSON files beside it.

        Raises ValueError if neither is there, a file is not valid, or an added token contradicts tokenizer.json.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        names = {key: _content(config.get(f"{key}_token") or special.get(f"{key}_token"), folder) for key in ("bos", "eos", "pad", "unk")}
        if (folder / "tokenizer.json").is_file():
            with _library_errors(folder / "tokenizer.json"):
                tokenizer = _load_tokenizers(folder, config)
                return _probed(cls(_JsonBackend(tokenizer), names, _template_prefix(tokenizer), folder))
        if not (folder / "tokenizer.model").is_file():
            raise ValueError(f"{folder} holds neither tokenizer.json nor tokenizer.model; give the folder of a released model.")
        return cls._from_sentencepiece(folder, config, special, names)

    @classmethod
    def _from_sentencepiece(cls, folder: Path, config: dict, special: dict, names: dict[str, str | None]) -> Tokenizer:
        for key, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "</s>")):
            names[key] = names[key] or default
        with _library_errors(folder / "tokenizer.model"):
            backend = _SentencePieceBackend(folder / "tokenizer.model", ())
            backend = _SentencePieceBackend(folder / "tokenizer.model", _added_tokens(folder, config, special, names, backend))
            bos = backend.pieces.bos_id()
            return _probed(cls(backend, names, [bos] if bos >= 0 and config.get("add_bos_token", True) else [], folder))

    @classmethod
    def from_tokenizers(
        cls, tokenizer: Any, *, bos: str | None = None, eos: str | None = None, pad: str | None = None, unk: str | None = None
    ) -> Tokenizer:
        """Wraps a `tokenizers.Tokenizer` made in memory; the names of its special tokens are given by hand."""
        return cls(_JsonBackend(tokenizer), {"bos": bos, "eos": eos, "pad": pad, "unk": unk}, _template_prefix(tokenizer), None)

    def encode(self, text: str, *, prefix: bool = False) -> list[int]:
        """Ids of the text, special tokens in it recognised; with `prefix` the reference's leading ids (BOS) come first.

        Raises SampleError for a text that is none: half of a surrogate pair, as a terminal of another encoding gives.
        """
        ids = self._cache.get(text)
        if ids is None:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise SampleError("a text holds half of a surrogate pair, which is no character; write it as UTF-8.") from None
            ids = self._backend.encode(text)
            if len(text) <= _CACHED_CHARACTERS:
                if len(self._cache) >= _CACHED_TEXTS:
                    self._cache.clear()
                self._cache[text] = ids
        return [*self.prefix_ids, *ids] if prefix else list(ids)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of the ids (a list or an integer array); ids outside the vocabulary are left out."""
        return self._backend.decode([int(index) for index in ids], skip_special)

    def id_of(self, token: str) -> int:
        """The id of one token by name. Raises ValueError if the vocabulary has none."""
        index = self._backend.id_of(token)
        if index is None:
            raise ValueError(f"the tokenizer {self._folder or 'in memory'} has no token {token!r}; add it to the vocabulary.")
        return index

    def has(self, token: str) -> bool:
        """Whether the vocabulary has a token of this name."""
        return self._backend.id_of(token) is not None

    def added_names(self) -> list[str]:
        """The tokens that are recognised in a text before everything else."""
        return self._backend.added()

    def token_of(self, index: int) -> str | None:
        """The name of an id, None outside the vocabulary."""
        return self._backend.token_of(int(index))

    def stripping(self, token: str) -> tuple[bool, bool]:
        """Whether an added token swallows white space to its (left, right)."""
        return self._backend.stripping(token)

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self._backend.size()

    def fingerprint(self) -> str:
        """A short digest that changes with the vocabulary; part of the key of cached indices."""
        import hashlib

        digest = hashlib.sha256(repr((self.prefix_ids, self._names)).encode())
        digest.update(self._backend.content())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer's files into the folder `path` (made if absent), so that `from_folder` reads it back."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        if self._folder is None:
            (target / "tokenizer.json").write_bytes(self._backend.content())
            config = {f"{key}_token": name for key, name in self._names.items() if name}
            (target / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
            return
        names = [*FILES, *(file.name for file in self._folder.glob("tokenization_*.py"))]
        for name in names:
            source = self._folder / name
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = jsontext.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object is expected; copy it again.")
    return value


class _FolderError(ValueError):
    """What is wrong in a tokenizer's files, as one sentence."""


def _content(entry: Any, folder: Path) -> str | None:
    """The text of a token that is written as a string or as an object; None for no token."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not entry and not isinstance(entry, dict):
        return None
    if not isinstance(text, str) or not text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _FolderError(f"{folder}: a token of the tokenizer's JSON files is {repr(entry)[:80]}; expected text, copy the files again.")
    return text


def _additional(config: dict, special: dict, folder: Path) -> list[Any]:
    """The entries of `additional_special_tokens` of both files."""
    found: list[Any] = []
    for section in (config, special):
        entries = section.get("additional_special_tokens") or []
        if not isinstance(entries, list):
            raise _FolderError(f"{folder}: additional_special_tokens is {repr(entries)[:80]}; expected a list, copy the files again.")
        found += [entry for entry in entries if _content(entry, folder)]
    return found


def _identified(entries: Any, folder: Path, file: str) -> list[tuple[int, Any]]:
    """(id, value) of pairs (id as number or text, value). Raises for an id that no vocabulary has."""
    found = []
    for index, value in entries:
        text = str(index) if isinstance(index, int | str) and not isinstance(index, bool) else ""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= _LARGEST_ID:
            raise _FolderError(f"{folder / file}: {repr(index)[:40]} is no token id; ids are below {_LARGEST_ID}, copy the file again.")
        found.append((int(text), value))
    return found


def _decoder_entries(config: dict, folder: Path) -> list[tuple[int, dict]]:
    """(id, entry) of `added_tokens_decoder`, every entry an object with a content."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise _FolderError(f"{folder}: added_tokens_decoder of tokenizer_config.json is no object of tokens; copy the file again.")
    found = _identified(entries.items(), folder, "tokenizer_config.json")
    for _, entry in found:
        _content(entry, folder)
    return found


@contextlib.contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turns whatever a tokenizer library raises on a damaged file into one ValueError.

    A panic of Rust is a BaseException, and its report goes straight to the standard error of the process: that is closed meanwhile.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any tokenizer ({_LARGEST_FILE}); copy it again.")
    try:
        with _silent_stderr():
            yield
    except (_FolderError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); copy it again.") from None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    try:
        saved = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _probed(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, after it has encoded and decoded a text. Raises _FolderError for ids that no vocabulary has."""
    if tokenizer.vocab_size > _LARGEST_ID:
        raise _FolderError(
            f"{tokenizer._folder}: the tokenizer has the id {tokenizer.vocab_size - 1}; ids are below {_LARGEST_ID}, copy the files again."
        )
    tokenizer.decode(tokenizer.encode("A b, 7\n\u00e9\u4e66"))
    return tokenizer


def _load_tokenizers(folder: Path, config: dict) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for index, entry in sorted(_decoder_entries(config, folder), key=lambda item: item[0]):
        name = entry["content"]
        if tokenizer.token_to_id(name) is None:
            flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")}
            token = tokenizers.AddedToken(name, **flags)
            (tokenizer.add_special_tokens if flags["special"] else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(name) != index:
            raise _FolderError(
                f"{folder}: token {name!r} has id {index} in tokenizer_config.json and {tokenizer.token_to_id(name)} in tokenizer.json; "
                "make the two files agree."
            )
    return tokenizer


def _template_prefix(tokenizer: Any) -> list[int]:
    """Ids that the post-processor puts before a text."""
    with_text = tokenizer.encode("a", add_special_tokens=True)
    if not any(with_text.special_tokens_mask):
        return []
    return with_text.ids[: with_text.special_tokens_mask.index(0)] if 0 in with_text.special_tokens_mask else []


def _added_tokens(folder: Path, config: dict, special: dict, names: dict, backend: _SentencePieceBackend) -> list[AddedToken]:
    """The added tokens of a sentencepiece folder.

    `added_tokens_decoder` of tokenizer_config.json counts; without it (older folders) added_tokens.json with the flags of
    special_tokens_map.json. The named special tokens are recognised in the text too. New ones go to the end.
    """
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    found: dict[str, AddedToken] = {}
    extra = _additional(config, special, folder)
    described = {_content(entry, folder): entry for entry in [*extra, *special.values()] if isinstance(entry, dict)}
    extra = [_content(entry, folder) for entry in extra]
    if config.get("added_tokens_decoder"):
        for index, entry in _decoder_entries(config, folder):
            found[entry["content"]] = AddedToken(entry["content"], index, **{k: bool(entry[k]) for k in flags if k in entry})
    else:
        specials = set(extra) | set(names.values())
        listed = [(index, _content(name, folder)) for name, index in _read_json(folder / "added_tokens.json").items()]
        for index, name in _identified(listed, folder, "added_tokens.json"):
            entry = described.get(name, {})
            options = {k: bool(entry[k]) for k in flags if k in entry and k != "special"}
            found[name] = AddedToken(name, index, special=name in specials, **options)
    size = backend.pieces.get_piece_size()
    for name in [*names.values(), *extra]:
        if name and name not in found:
            index = backend.id_of(name)
            taken = max([size - 1, *(token.id for token in found.values())])
            found[name] = AddedToken(name, taken + 1 if index is None else index)
    return list(found.values())
