"""The tokens that a language model's vocabulary gains, written into copies of its tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monovl_jax import jsontext
from monovl_jax.convert.errors import WeightsError
from monovl_jax.data.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""In the order in which upstream adds them (internvl_chat_finetune.py:746-749)."""

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def new_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: id} of those special tokens that the vocabulary lacks: they follow its last id."""
    missing = [name for name in SPECIAL_TOKENS if _id_or_none(tokenizer, name) is None]
    return {name: tokenizer.vocab_size + i for i, name in enumerate(missing)}


def _id_or_none(tokenizer: Tokenizer, name: str) -> int | None:
    try:
        return tokenizer.id_of(name)
    except ValueError:
        return None


def _read(path: Path) -> dict[str, Any]:
    return jsontext.read(path) if path.is_file() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def add_tokens(folder: Path, ids: dict[str, int]) -> None:
    """Adds special tokens to the tokenizer in `folder`, in every file that names added tokens.

    Raises WeightsError when the files cannot hold them under these ids.
    """
    before = Tokenizer.from_folder(folder)
    config, special = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
    json_path, added_path = folder / "tokenizer.json", folder / "added_tokens.json"
    added = _read(added_path)
    decoder = config.setdefault("added_tokens_decoder", {})
    if not json_path.is_file() and not decoder:  # an older folder: its own added tokens are spread over other files
        extra = [*config.get("additional_special_tokens", []), *special.get("additional_special_tokens", [])]
        named = [value for key, value in {**special, **config}.items() if key in ("bos_token", "eos_token", "unk_token", "pad_token")]
        for name in [*added, *map(_content, [*extra, *named])]:
            if isinstance(name, str) and name:
                decoder[str(before.id_of(name))] = {"content": name, **_FLAGS}
    if json_path.is_file():
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(json_path))
        for entry in decoder.values():  # some folders name tokens in the config alone
            if backend.token_to_id(entry["content"]) is None:
                backend.add_special_tokens([tokenizers.AddedToken(entry["content"], normalized=False)])
        backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in ids])
        backend.save(str(json_path))
    if decoder or not json_path.is_file():
        decoder |= {str(index): {"content": name, **_FLAGS} for name, index in ids.items()}
    else:
        del config["added_tokens_decoder"]
    for path, content in ((folder / "tokenizer_config.json", config), (folder / "special_tokens_map.json", special)):
        if path.is_file() or path.name == "tokenizer_config.json":
            content["additional_special_tokens"] = [*content.get("additional_special_tokens", []), *ids]
            _write(path, content)
    if added_path.is_file() or not json_path.is_file():
        _write(added_path, added | ids)
    after = Tokenizer.from_folder(folder)
    for name, index in ids.items():
        if _id_or_none(after, name) != index or after.encode(name) != [index]:
            raise WeightsError(f"{folder}: the tokenizer does not take {name!r} as id {index}; is tokenizer.json of another model?")
