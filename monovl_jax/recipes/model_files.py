"""The files that make a run directory a model for others too: the tokenizer's, and those that travel with the weights it starts from."""

from __future__ import annotations

from pathlib import Path

from monovl_jax.convert.folders import CARRIED, carried_files
from monovl_jax.data.tokenizer import FILES as TOKENIZER_FILES
from monovl_jax.training.files import AnyPath, write_bytes


def _carried(folder: AnyPath) -> list[AnyPath]:
    """What a model folder or a run directory carries. Raises WeightsError for a link that leads out of the folder; buckets have none."""
    if isinstance(folder, Path):
        return list(carried_files(folder))
    names = [*CARRIED, *sorted(path.name for path in folder.glob("*.py"))]
    return [folder / name for name in names if (folder / name).is_file()]


def _of_tokenizer(name: str) -> bool:
    return name in TOKENIZER_FILES or (name.startswith("tokenization_") and name.endswith(".py"))


def model_files(tokenizer: Path, start: AnyPath | None) -> list[AnyPath]:
    """Files for the run directory, `config.json` not among them: the tokenizer's from the one folder, all others from the other.

    start: the folder or run of the first weights (generation_config.json, the Python code that transformers needs, LICENSE, ...); None for
    random weights. Raises WeightsError when one of the files is a link that leads out of its folder, OSError when a folder cannot be read.
    """
    words = [path for path in _carried(tokenizer) if _of_tokenizer(path.name)]
    others = [] if start is None else [path for path in _carried(start) if not _of_tokenizer(path.name)]
    return [*words, *others]


def copy_files(files: list[AnyPath], folder: AnyPath) -> None:
    """Copies files into a folder, which may lie in a bucket; each is there as a whole or not at all."""
    for file in files:
        write_bytes(folder / file.name, file.read_bytes())
