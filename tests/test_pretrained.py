"""A model folder as it is used: what its files say holds, and what does not fit is refused before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from PIL import Image

from monovl_jax.config import tiny
from monovl_jax.pretrained import from_pretrained
from tests.convert.helpers import random_upstream, write_model
from tests.data.helpers import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_model(tmp_path / "model", tiny(), random_upstream(tiny()))
    (made / "added_tokens.json").unlink()
    tiny_tokenizer().save(made)
    return made


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("dynamic", "tiles"), [(True, 3), (False, 1)])
def test_dynamic_image_size_decides_the_tiles(dynamic: bool, tiles: int, folder: Path) -> None:
    change(folder, dynamic_image_size=dynamic)
    prompt = from_pretrained(folder).prompt("hi", [Image.new("RGB", (300, 100))])
    assert prompt.tiles is not None and len(prompt.tiles) == tiles


def test_an_unknown_template_is_named_before_the_weights_are_read(folder: Path) -> None:
    change(folder, template="nope")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"chat template 'nope' is unknown; known are internlm2-chat, "):
        from_pretrained(folder)


def test_a_token_without_a_row_in_the_model_is_refused(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([f"<x{i}>" for i in range(400)])
    backend.save(str(folder / "tokenizer.json"))
    last = backend.token_to_id("<x399>")
    with pytest.raises(ValueError, match=rf"goes up to id {last} \('<x399>'\) and the model has 300 rows"):
        from_pretrained(folder)
