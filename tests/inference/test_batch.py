"""A file of prompts: what is written, what is refused, and going on after a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from monovl_jax.data.errors import SampleError
from monovl_jax.inference.batch import BatchError, Summary, answer_file, finished_answers, parse_job
from monovl_jax.inference.sampling import Sampling
from tests.data.helpers import save_picture
from tests.inference.helpers import quick, small_model

__all__ = ["quick"]  # a fixture
NEW = 4
ENTRIES: list[dict[str, Any]] = [
    {"prompt": "one"},
    {"prompt": "look", "image": "a.png", "id": "p"},
    {"prompt": "three " * 8},
    {"prompt": "both", "images": ["a.png", "sub/b.png"]},
    {"prompt": "five", "id": 50},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_picture(tmp_path / "a.png", (32, 32))
    save_picture(tmp_path / "sub" / "b.png", (64, 32))
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)) + "\n\n")
    return path


def run(source: Path, name: str = "out.jsonl", **options: Any) -> tuple[Summary, dict[Any, str], list[str]]:
    said: list[str] = []
    target = source.parent / name
    summary = answer_file(small_model(), small_model().generator, source, target, max_new_tokens=NEW, report=said.append, **options)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return summary, {line["id"]: line["answer"] for line in lines}, said


def alone(entry: dict[str, Any], folder: Path) -> str:
    model = small_model()
    images = [folder / i for i in entry.get("images", [entry["image"]] if "image" in entry else [])]
    (ids,) = model.generator([model.prompt(entry["prompt"], images)], NEW)
    return model.tokenizer.decode(ids).strip()


def test_every_line_is_answered_as_alone(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary, answers, said = run(source, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert summary == Summary(answered=5) and not said
    assert answers == {name: alone(e, source.parent) for name, e in zip((1, "p", 3, 4, 50), ENTRIES, strict=True)}
    assert seen[-1] == (5, 5) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_going_on_after_a_stop(source: Path) -> None:
    """The file of a run that was killed in the middle of a line."""
    _, whole, _ = run(source, "whole.jsonl")
    lines = (source.parent / "whole.jsonl").read_text().splitlines(keepends=True)
    (source.parent / "out.jsonl").write_text(lines[0] + lines[1] + lines[2][:-9])
    summary, answers, _ = run(source)
    assert summary == Summary(answered=3, skipped=2) and answers == whole
    assert run(source)[0] == Summary(skipped=5)


def test_random_draws_do_not_depend_on_the_batch(source: Path) -> None:
    hot = Sampling(temperature=3.0, seed=5)
    first, second = (run(source, f"{n}.jsonl", batch_size=n, sampling=hot)[1] for n in (1, 4))
    assert first == second != run(source, "greedy.jsonl")[1]


def test_bad_lines_are_counted_and_the_rest_is_answered(source: Path) -> None:
    bad = ['{"prompt": 1}', "{", '{"prompt": "x", "image": "missing.png"}', '{"prompt": "x", "id": 50}', json.dumps({"prompt": "x" * 600})]
    with open(source, "a") as file:
        file.write("\n".join(bad))
    summary, answers, said = run(source)
    assert summary == Summary(answered=5, bad=5) and len(answers) == 5
    for line, words in zip(
        said, ('no text "prompt"', "not valid JSON", "does not exist", "repeats the id 50", "more than the model's 512"), strict=True
    ):
        assert words in line and f"{source}, line " in line


def test_hostile_lines_do_not_stop_the_file(source: Path) -> None:
    """Bytes that are no UTF-8, deep nesting, endless numbers and half of a character are one bad line each."""
    bad = [b'{"prompt": "\xe9"}', b"[" * 100_000, b'{"prompt": "x", "id": ' + b"9" * 5_000 + b"}", b'{"prompt": "\\ud800"}']
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(bad) + b"\n" + source.read_bytes())
    summary, answers, said = run(source)
    assert summary == Summary(answered=5, bad=4) and 50 in answers
    for line, words in zip(said, ("not UTF-8", "nested more than 64", "5000 digits", "surrogate"), strict=True):
        assert words in line


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl"])
def test_pipes_are_refused_before_they_are_opened(name: str, source: Path) -> None:
    (source.parent / name).unlink(missing_ok=True)
    os.mkfifo(source.parent / name)
    with pytest.raises(BatchError, match=f"{name} is no regular file"):
        answer_file(small_model(), small_model().generator, source, source.parent / "out.jsonl", max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", 'no text "prompt"'),
        ('{"prompt": "  "}', 'no text "prompt"'),
        ('{"prompt": "x", "id": 1.5}', "id 1.5"),
        ('{"prompt": "x", "id": true}', "id True"),
        ('{"prompt": "x", "image": 3}', "names its images wrongly"),
        ('{"prompt": "x", "image": "a", "images": []}', "names its images wrongly"),
        ('{"prompt": "x", "images": [3]}', "names its images wrongly"),
        ('{"prompt": "x", "image": "/etc/passwd"}', "absolute"),
        ('{"prompt": "x", "image": "../a.png"}', r"contains '\.\.'"),
    ],
)
def test_lines_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=message):
        parse_job(text, 1, tmp_path)


def test_an_output_of_something_else_is_left_alone(source: Path) -> None:
    target = source.parent / "out.jsonl"
    target.write_text('{"id": 1}\nhello\n{"id": 2}\n')
    with pytest.raises(BatchError, match="line 2: not a line of answers"):
        run(source)
    assert target.read_text() == '{"id": 1}\nhello\n{"id": 2}\n'
    with pytest.raises(BatchError, match="cannot be used"):
        run(source.parent / "missing.jsonl")
    assert finished_answers(source.parent / "new") == {}


def test_answers_belong_to_model_settings_and_question(source: Path) -> None:
    run(source)
    for change, message in (
        ({"sampling": Sampling(temperature=1.0)}, "with other settings"),
        ({"sampling": Sampling(repetition_penalty=2.0)}, "with other settings"),
    ):
        with pytest.raises(BatchError, match=message):
            run(source, **change)
    text = source.read_text()
    source.write_text(text.replace('"one"', '"uno"'))
    with pytest.raises(BatchError, match="answers another question under the id 1"):
        run(source)
    source.write_text(text.replace('"sub/b.png"', '"a.png"'))
    with pytest.raises(BatchError, match=r"the answer to 4 was made .* about other images"):
        run(source)
    source.write_text(text)
    first = (source.parent / "a.png").read_bytes()
    save_picture(source.parent / "a.png", (32, 31))
    with pytest.raises(BatchError, match="about other images"):
        run(source)
    (source.parent / "a.png").write_bytes(first)
    target = source.parent / "out.jsonl"
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    target.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "key"}) + "\n" for line in lines))
    assert run(source)[0] == Summary(skipped=5), "answers of version 0.1.0 have no key"


def test_another_model_has_another_fingerprint() -> None:
    import jax

    made = small_model().generator
    first = made.fingerprint()
    assert first == made.fingerprint()
    leaves, tree = jax.tree.flatten(made.params)
    leaves[0] = leaves[0].at[(-1,) * leaves[0].ndim].add(1)  # one number of one parameter
    params, made.params = made.params, jax.tree.unflatten(tree, leaves)
    try:
        assert made.fingerprint() != first
    finally:
        made.params = params


@pytest.mark.parametrize("content", ["hello\n", "hello", '{"a": 1}\n', '{"answer": "x"', '{"id": 1}\n{"id"  : 2'])
def test_a_file_of_somebody_else_is_not_cut(source: Path, content: str) -> None:
    """Only a line of ours can have been cut off."""
    (source.parent / "out.jsonl").write_text(content)
    with pytest.raises(BatchError, match="not a line of answers"):
        run(source)
    assert (source.parent / "out.jsonl").read_text() == content


def test_blank_lines_of_the_answers_stay(source: Path) -> None:
    run(source)
    target = source.parent / "out.jsonl"
    content = target.read_text() + "\n  \n"
    target.write_text(content)
    assert len(finished_answers(target)) == 5 and target.read_text() == content
