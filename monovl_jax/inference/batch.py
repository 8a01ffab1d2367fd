"""`monovl generate` for a file of prompts: one JSON object a line in, one a line out, as they come; rerun to go on.

in   {"prompt": "What is this?", "image": "cat.png"}        images: a list of several; id: any text or number, by default the line
out  {"id": 1, "prompt": "What is this?", "answer": "A cat.", "key": "0123456789abcdef"}

`key` is a digest of what the answer follows from: the model, the settings, the prompt and the contents of its images. An answer whose
key is another than that of the question with its id is never taken for an answer to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import read_image, resolve_image_path
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt, bucket, slots_for
from monovl_jax.inference.sampling import GREEDY, Sampling

WINDOW = 16
"""Batches of prompts that are looked at together and sorted by size."""


BEGINNING = b'{"id": '
"""Of every line that is written."""


@runtime_checkable
class PromptModel(Protocol):
    """What this needs of a loaded model (`monovl_jax.Pretrained` has it)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def prompt(self, text: str, images: list[Any]) -> Prompt: ...


class BatchError(ValueError):
    """A file that cannot be read or written to; the message says where and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the input: its number from 1 on, its id, the text, the paths of its images, and the key of its answer."""

    line: int
    id: str | int
    prompt: str
    images: tuple[Path, ...]
    key: str = ""


@dataclasses.dataclass
class Summary:
    """answered: written now. skipped: were in the output already. bad: lines that could not be used."""

    answered: int = 0
    skipped: int = 0
    bad: int = 0


def parse_job(text: str | bytes, line: int, image_root: Path) -> Job:
    """Reads one line. Raises SampleError for anything but what the head of this file shows, or an image outside `image_root`."""
    try:
        entry = jsontext.line(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    except ValueError as error:
        raise SampleError(f"is not valid JSON ({error}); write one object a line.") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise SampleError('has no text "prompt"; write {"prompt": "...", "image": "..."}.')
    name, images = entry.get("id", line), entry.get("images", entry.get("image", []))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise SampleError(f"has the id {name!r}; give text or a whole number.")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images) or ("image" in entry and "images" in entry):
        raise SampleError('names its images wrongly; write "image": "one.png" or "images": ["one.png", "two.png"].')
    return Job(line, name, entry["prompt"], tuple(resolve_image_path(image_root, image) for image in images))


def finished_answers(target: Path) -> dict[str | int, dict[str, Any]]:
    """{id: line} of what the output file has already. A last line of ours that was cut off is removed from the file.

    Raises BatchError for any other line that is not one of ours; the file stays as it is then.
    """
    if not target.exists():
        return {}
    done: dict[str | int, dict[str, Any]] = {}
    if not target.stat().st_size:  # nothing is there yet, or it is a file of /proc, which may have no end
        return done
    with open(target, "r+b") as file:
        for number, offset, line in jsontext.lines(file):
            if not line.endswith(b"\n") and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                file.truncate(offset)  # cut off
                break
            try:
                entry: Any = jsontext.loads(line)
                done[entry["id"]] = entry
            except (ValueError, TypeError, KeyError):
                raise BatchError(f"{target}, line {number}: not a line of answers; give another output file, or remove the line") from None
    return done


def answer_file(
    model: PromptModel,
    generator: Generator,
    source: Path,
    target: Path,
    *,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    image_root: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Answers every line of `source` that `target` has no answer to, a batch of prompts of like size at a time.

    Lines are answered as if each were alone: its random draws follow from the seed and its line number.

    Args:
      image_root: images lie under it; by default the folder of `source`.
      report: gets a sentence for every bad line.
      progress: called with (lines done, lines in all).

    Raises BatchError when `source` cannot be read or `target` holds something else: answers of another model or to other questions too.
    """
    image_root = source.parent if image_root is None else image_root
    try:
        _check_regular(source)
        _check_regular(target)
        total = sum(1 for _ in _lines(source))
        done = finished_answers(target)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BatchError(f"{source} or {target} cannot be used ({error}); check the paths") from None
    summary, seen = Summary(), set()
    made_by = f"{generator.fingerprint()} {model.tokenizer.fingerprint()} {max_new_tokens} {sampling}"

    def key(job: Job) -> str:
        draw = job.line if sampling.temperature else 0  # random draws follow from the line
        images = [hashlib.sha256(read_image(image)).hexdigest() for image in job.images]
        return hashlib.sha256(json.dumps([made_by, draw, job.prompt, images]).encode()).hexdigest()[:16]

    def bad(line: int, error: Exception) -> None:
        summary.bad += 1
        report(f"{source}, line {line}: {error}")

    def jobs() -> Iterator[tuple[Job, Prompt]]:
        for line, text in _lines(source):
            try:
                job = parse_job(text, line, image_root)
                if job.id in seen:
                    raise SampleError(f"repeats the id {job.id!r}; ids must differ.")
                seen.add(job.id)
                job = dataclasses.replace(job, key=key(job))
                if job.id in done:
                    _check_answer(done[job.id], job, target)
                    summary.skipped += 1
                    continue
                prompt, most = model.prompt(job.prompt, list(job.images)), model.config.decoder.max_position_embeddings
                if len(prompt.ids) + max_new_tokens > most:
                    raise SampleError(
                        f"has {len(prompt.ids)} tokens, and with {max_new_tokens} new ones more than the model's {most}; "
                        "shorten it, or lower max_new_tokens."
                    )
            except SampleError as error:
                bad(line, error)
                continue
            yield job, prompt

    with open(target, "a", encoding="utf-8") as file:
        source_of_jobs = jobs()
        while window := list(itertools.islice(source_of_jobs, WINDOW * batch_size)):
            for (slots, tiles), group in _by_bucket(window, generator.piece):
                for part in _batched(group, batch_size):
                    rows = bucket(len(part), 1)
                    padded = [*part, *[part[-1]] * (rows - len(part))]
                    made = generator([p for _, p in padded], max_new_tokens, slots, tiles, sampling, [j.line for j, _ in padded])
                    for (job, _), ids in zip(part, made, strict=False):
                        answer = model.tokenizer.decode(ids.tolist()).strip()
                        line = {"id": job.id, "prompt": job.prompt, "answer": answer, "key": job.key}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    summary.answered += len(part)
                    progress(summary.answered + summary.skipped + summary.bad, total)
    progress(summary.answered + summary.skipped + summary.bad, total)
    return summary


def _check_answer(there: dict[str, Any], job: Job, target: Path) -> None:
    """Raises BatchError when an answer is not one to this question by this model. Answers of version 0.1.0 tell the question alone."""
    if there.get("prompt") != job.prompt:
        raise BatchError(f"{target} answers another question under the id {job.id!r}; give another output file, or another id")
    if there.get("key", job.key) != job.key:
        raise BatchError(
            f"{target}: the answer to {job.id!r} was made by another model, with other settings or about other images; "
            "give another output file, or remove this one"
        )


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the lines that are not blank."""
    with open(source, "rb") as file:
        yield from ((number, line) for number, _, line in jsontext.lines(file))


def _check_regular(path: Path) -> None:
    """A pipe cannot be read twice, and a device has no end."""
    if path.exists() and not path.is_file():
        raise BatchError(f"{path} is no regular file; give the path of a file of lines")


def _by_bucket(jobs: Sequence[tuple[Job, Prompt]], piece: int) -> Iterator[tuple[tuple[int, int], list[tuple[Job, Prompt]]]]:
    """Prompts that fit the same shape (slots, tiles) together."""
    groups: dict[tuple[int, int], list[tuple[Job, Prompt]]] = {}
    for job, prompt in jobs:
        tiles = 0 if prompt.tiles is None else bucket(len(prompt.tiles), 1)
        groups.setdefault((slots_for(len(prompt.ids), piece), tiles), []).append((job, prompt))
    yield from sorted(groups.items(), key=lambda item: item[0])


def _batched(items: Sequence[Any], n: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + n] for at in range(0, len(items), n))
