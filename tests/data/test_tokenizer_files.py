"""Whatever stands in a tokenizer's files, reading them gives a tokenizer or one sentence."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from monovl_jax.data.tokenizer import Tokenizer
from tests.data.helpers import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save(tmp_path)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert str(folder) in message and "copy" in message and "\n" not in message and len(message) < 500 + len(str(folder))
    return message


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 5},
        {"eos_token": {"content": 5}},
        {"eos_token": {}} | {"pad_token": {"content": None}},
        {"eos_token": "\ud800"},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"7": {}}},
        {"added_tokens_decoder": {"7": "<x>"}},
        {"added_tokens_decoder": {"7": {"content": ["<x>"]}}},
        {"added_tokens_decoder": {"seven": {"content": "<x>"}}},
        {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
        {"added_tokens_decoder": {"9" * 30: {"content": "<x>"}}},
        {"added_tokens_decoder": {"7": {"content": "\udfff"}}},
    ],
)
def test_a_damaged_tokenizer_config(config: dict[str, Any], folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # a panic of Rust
        ("model", {"type": "BPE"}),
        ("model", 3),
        ("decoder", {"type": "nothing"}),
        ("added_tokens", [{"id": -1}]),
    ],
)
def test_a_damaged_tokenizer_json_says_one_sentence_and_nothing_else(
    key: str, value: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {key: value}))
    refused(folder)
    assert capfd.readouterr() == ("", ""), "the library reports a panic on the standard error by itself"
    os.write(2, b"open again")
    assert capfd.readouterr().err == "open again"


def test_a_huge_id_is_refused_without_the_memory_for_it(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["never"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tracemalloc.start()
    assert "2147483648" in refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_only_regular_files_are_read(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor"):
        Tokenizer.from_folder(folder)


def test_a_file_beyond_all_tokenizers_is_not_read(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 1 << 40)
    assert "more than any tokenizer" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x0a\x05hello" * 100, bytes(range(256)) * 10])
def test_a_damaged_sentencepiece_model(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    refused(folder)
