"""`monovl train` from end to end on a handful of pictures, good and bad: through the command line's functions, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import pallas_kernels
from monovl_jax import cli
from monovl_jax.config import config_to_json, tiny
from monovl_jax.data.images import recompress
from monovl_jax.data.meta import MetaError, read_meta, shares
from monovl_jax.data.pipeline import Pipeline
from monovl_jax.data.prepare import TextSettings, find_sets
from monovl_jax.data.prepare import prepare as prepare_data
from monovl_jax.data.sources import BadSamples
from monovl_jax.data.tiling import TilingConfig
from monovl_jax.model import Ops
from monovl_jax.pretrained import export, from_pretrained
from monovl_jax.recipes import launch
from monovl_jax.recipes.find import adapted, find_recipe
from monovl_jax.recipes.model_files import model_files
from monovl_jax.training import checkpoint
from monovl_jax.training.checkpoint import read_experiment
from monovl_jax.training.metrics import read_log
from monovl_jax.training.stages import RecipeError
from monovl_jax.training.trainable import digests
from tests.convert.helpers import random_upstream, write_model
from tests.data.helpers import line, save_picture, tiny_tokenizer

RECIPE = '''
"""A recipe as a user writes one."""

import dataclasses

from monovl_jax.config import tiny
from monovl_jax.training.stages import Recipe, Stage

VISUAL = (r"^vision/", r"^projector/", r"^decoder/blocks/mlp/visual/")
ROWS = dict(batch_size=2, sequence_length=96, tiles_per_row=6, learning_rate=1e-3)

concept = Stage("S1.1", VISUAL, steps=3, mixture={"street": 3.0, "words": 1.0}, **ROWS)
instruction = Stage("S2", (r".*",), steps=4, mixture={"*": 1.0}, **ROWS)
beside = dataclasses.replace(instruction, text_rows=2, text_length=48, text_mixture={"words": 1.0})
two = Recipe("two", tiny(), (concept, instruction), copy_experts_before="S1.1")


def one() -> Recipe:
    return dataclasses.replace(two, name="one", stages=(concept,))


def with_text() -> Recipe:
    return dataclasses.replace(two, stages=(concept, beside))


def larger() -> Recipe:
    model = dataclasses.replace(tiny(), decoder=dataclasses.replace(tiny().decoder, hidden_size=128))
    return dataclasses.replace(two, model=model)


unknown = dataclasses.replace(two, stages=(dataclasses.replace(concept, trainable=(r"^vision_model/",)),))
small_vocabulary = dataclasses.replace(
    two, model=dataclasses.replace(tiny(), decoder=dataclasses.replace(tiny().decoder, vocab_size=50))
)


def broken():
    return 1 / 0


def with_argument(rows, tiles):
    return two


nothing = 3
'''

GOOD = [
    line("a.png", id=0),
    line("sub/b.jpg", question="No placeholder: it goes first."),
    line(["a.png", "tall.png"], question="<image><image>Two pictures"),
    line(None, question="text alone"),
    line("dot.png", question="<image>one pixel"),
    line("long.png", question="<image>20,000 px wide"),
]
BAD = {
    "missing.png does not exist": line("missing.png", id="gone"),
    "is empty (0 bytes)": line("empty.png"),
    "more than 178 million pixels": line("huge.png"),
    "1 <image> for 2": line(["a.png", "a.png"]),
    "2 <image> for 1": line("a.png", question="<image><image>"),
    "conversation is empty": b'{"conversations": []}\n',
    "unknown role 'robot'": b'{"conversations": [{"from": "robot", "value": "x"}]}\n',
    "not UTF-8": b'{"conversations": "\xff"}\n',
    "contains '..'": line("../secret.png"),
    "is absolute": line("/etc/hostname"),
    "through a symbolic link": line("link.png"),
    "of 7 tiles, a row holds 6": line(["dot.png"] * 7, question="<image>" * 7),
    "reaches beyond the limit of 96": line("a.png", question="y" * 120 + "<image>"),
}
"""What is found when the data is indexed. A truncated JPEG is found when it is decoded."""


def reference_ops(dtype: str | None = None, remat: str | None = None) -> Ops:
    """Experts computed plainly, which compiles in a fraction of the time; float32."""
    del dtype, remat
    return Ops(routed_swiglu=partial(pallas_kernels.routed_swiglu, implementation="reference"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures, two data sets, META.json, a recipe file, a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    pictures = home / "pictures"
    save_picture(pictures / "a.png", (64, 32))
    save_picture(pictures / "sub/b.jpg", (40, 40))
    save_picture(pictures / "tall.png", (32, 90))
    save_picture(pictures / "dot.png", (1, 1))
    save_picture(pictures / "long.png", (20_000, 4))
    save_picture(pictures / "cut.jpg", (64, 64), cut=0.6)
    Image.new("1", (20_000, 20_000)).save(pictures / "huge.png")
    (pictures / "empty.png").touch()
    save_picture(home / "secret.png")
    (pictures / "link.png").symlink_to(home / "secret.png")
    (home / "street.jsonl").write_bytes(b"".join([*GOOD, *BAD.values()]) + line("cut.jpg"))
    (home / "words.jsonl").write_bytes(b"".join(line(None, question=f"say {i}", answer=str(i)) for i in range(9)))
    meta = {
        "street": {"root": "pictures", "annotation": "street.jsonl", "data_augment": True, "repeat_time": 2, "max_dynamic_patch": 3},
        "words": {"annotation": "words.jsonl", "repeat_time": 0.5, "length": 10},
    }
    (home / "meta.json").write_text(json.dumps(meta))
    (home / "recipes.py").write_text(RECIPE)
    tiny_tokenizer().save(home / "tokenizer")
    return home


def command(home: Path, name: str = "two", **options: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `monovl train recipes.py:NAME --data meta.json ...`."""
    defaults = {"data": home / "meta.json", "tokenizer": home / "tokenizer", "run_dir": home / "runs" / "new", "threads": 1}
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(launch, "make_ops", reference_ops)
        code = cli.train(name if ":" in name or name.startswith("evip") else f"{home / 'recipes.py'}:{name}", **{**defaults, **options})
    return code, out.getvalue(), err.getvalue()


def refused(home: Path, name: str = "two", **options: Any) -> str:
    """The one sentence with which a command is refused; nothing was trained, no run directory made."""
    code, out, err = command(home, name, **options)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("monovl train: ") and "Traceback" not in err, err
    assert "compiling" not in err
    assert not (home / "runs" / "new" / "experiment.json").exists()
    return last


def losses(run: Path, stage: str) -> list[str]:
    return [row["loss"].hex() for row in read_log(run / "log.jsonl") if row["stage"] == stage]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """XLA leaves most optimisations out, and a step that was compiled once in this module is not compiled again."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[Path, str, str]:
    """A finished run of both stages: (run directory, stdout, stderr)."""
    run = home / "runs" / "trained"
    code, out, err = command(home, run_dir=run)
    assert code == 0, err
    return run, out, err


def test_a_run_from_start_to_end(home: Path, trained: tuple[Path, str, str]) -> None:
    run, out, err = trained
    assert [text.split()[:2] for text in out.splitlines()] == [["S1.1", "3"], ["S2", "4"]]
    assert "RANDOM weights" in err and "before S1.1 the visual experts are replaced by copies" in err
    assert f"'street' for rows of 96 tokens and 6 tiles: {len(GOOD) + 1} good samples, {len(BAD)} bad" in err
    assert "'words' has 10 samples" in err and "has 9" in err
    assert len(losses(run, "S1.1")) == 3 and len(losses(run, "S2")) == 4

    entries = [json.loads(text) for text in (run / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["file"], e["line"]) for e in entries[: len(BAD)]] == [
        (str(home / "street.jsonl"), len(GOOD) + 1 + n) for n in range(len(BAD))
    ]
    for entry, reason in zip(entries, BAD, strict=False):
        assert reason in entry["reason"]
    assert entries[0]["id"] == "gone"
    assert len(entries) == len(BAD) + 1 and "truncated" in entries[-1]["reason"], "cut.jpg is found when it is decoded"
    assert f"bad samples so far: {len(entries)}" in err.splitlines()[-1]

    summary = json.loads((run / "data.json").read_text())
    assert [(r["rows"], r["data_set"], r["samples"], r["bad"], r["share"]) for r in summary["S1.1"]] == [
        ("main", "street", 7, len(BAD), 0.75),
        ("main", "words", 4, 0, 0.25),
    ]
    # "*": street has 7 samples, repeated twice; words the first half of 9, once.
    assert [(r["rows"], r["data_set"], round(r["share"], 6)) for r in summary["S2"]] == [
        ("main", "street", round(14 / 18, 6)),
        ("main", "words", round(4 / 18, 6)),
    ]


def test_the_run_directory_is_a_model(trained: tuple[Path, str, str]) -> None:
    loaded = from_pretrained(trained[0])
    assert loaded.config == tiny() and loaded.tokenizer.fingerprint() == tiny_tokenizer().fingerprint()
    before, after = (digests(from_pretrained(trained[0], stage).params) for stage in ("S1.1", "S2"))
    assert {path for path in before if before[path] != after[path]} > {"decoder/embedding", "decoder/head"}


def test_a_second_stage_of_its_own_interrupted_and_resumed(home: Path, trained: tuple[Path, str, str]) -> None:
    """S2 alone from the end of S1.1, stopped before its third step and continued: the losses are those of the whole run."""
    run, original = home / "runs" / "second", launch.Launch.batches
    options: dict[str, Any] = dict(run_dir=run, init=trained[0], init_stage="S1.1", tokenizer=None, stages=("S2",), checkpoint_every=1)

    def stopping(self: launch.Launch, stage: Any, position: int):
        for number, batch in enumerate(original(self, stage, position)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "batches", stopping)
        code, _, err = command(home, **options)
    assert code == 130 and "the same command goes on" in err and "weights from" in err and "visual experts are replaced" not in err
    saved: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        original_restore = Pipeline.restore
        patch.setattr(Pipeline, "restore", lambda self, state: saved.append(original_restore(self, state)) or saved[-1])
        code, _, err = command(home, **options)
    assert code == 0 and "continued after 2" in err and "planned again" not in err and saved and all(saved), err
    assert losses(run, "S2") == losses(trained[0], "S2")
    listed = (run / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == len(set(listed)) == len(BAD) + 1


def test_a_run_of_the_first_version_goes_on_as_it_began(home: Path, trained: tuple[Path, str, str], tmp_path: Path) -> None:
    """It took control tokens in texts for such, and did not say so."""
    shutil.copytree(trained[0], tmp_path / "run")
    record = read_experiment(tmp_path / "run")
    assert record["identity"].pop("control_tokens") == "text"
    code, _, err = command(home, run_dir=tmp_path / "run", trust_control_tokens=True)
    assert code == 2 and "identity.control_tokens is 'text' there and 'absent' here" in err
    old = {key: value for key, value in record.items() if key != "checksum"}
    (tmp_path / "run/experiment.json").write_text(json.dumps(old | {"digest": checkpoint._digest(old)}))
    for options in ({}, {"trust_control_tokens": True}):
        code, _, err = command(home, run_dir=tmp_path / "run", **options)
        assert code == 0 and ("taken for such, and goes on so" in err) == (not options), err


def test_a_finished_run_is_left_alone(home: Path, trained: tuple[Path, str, str]) -> None:
    run, out, _ = trained
    before = (run / "log.jsonl").read_text()
    code, again, err = command(home, run_dir=run, threads=2)
    assert code == 0 and again == out and "compiling" not in err and (run / "log.jsonl").read_text() == before


def test_check_trains_nothing(home: Path) -> None:
    run = home / "runs" / "checked"
    code, out, err = command(home, "with_text", run_dir=run, check=True)
    assert code == 0 and not out and "compiling" not in err and not (run / "experiment.json").exists()
    assert "S1.1: the first batch (main rows) holds" in err and "S2: the first batch (text rows) holds" in err


def test_prepared_data_is_trained_like_the_files_it_was_made_of(home: Path) -> None:
    settings = TextSettings(home / "tokenizer", "compact", TilingConfig(32, 1, 6, True), 4)
    prepare_data(find_sets(home / "meta.json"), home / "prepared", settings, say=lambda text: None)
    said = [command(home, data=data, check=True, run_dir=home / "runs" / "look") for data in (home / "meta.json", home / "prepared")]
    lines = [[text for text in err.splitlines() if "first batch" in text or "good samples" in text] for _, _, err in said]
    assert [code for code, _, _ in said] == [0, 0] and lines[0] == lines[1] and len(lines[0]) >= 4
    (home / "prepared" / "street" / "shard-00000.npz").unlink()
    assert "shard-00000.npz is missing" in refused(home, data=home / "prepared")


def test_strict_stops_at_the_first_bad_sample(home: Path) -> None:
    assert f"street.jsonl:{len(GOOD) + 1}: image" in refused(home, strict=True)


def test_strict_stops_at_a_picture_that_does_not_decode(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_bytes(line("cut.jpg"))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"root": str(home / "pictures"), "annotation": "cut.jsonl"} for name in ("street", "words")}))
    code, _, err = command(home, "one", strict=True, data=meta, run_dir=tmp_path / "run", check=True)
    assert code == 2 and "cut.jsonl:1: image" in err and "truncated" in err and "Traceback" not in err
    assert "cut.jsonl:1:" in refused(home, "one", strict=True, data=meta, verify_images=True)
    assert "has no sample to train on" in refused(home, "one", data=meta, verify_images=True, run_dir=tmp_path / "other")


def test_recipes_that_cannot_be_found(home: Path) -> None:
    file = home / "recipes.py"
    assert "known: evip, evip_plus_plus, sft;" in refused(home, "nonsense:x")
    assert "does not exist" in refused(home, f"{home / 'none.py'}:x")
    assert "has no 'three'; recipes in it: two, one, with_text, larger, unknown, small_vocabulary" in refused(home, "three")
    assert "is a int; give a" in refused(home, "nothing")
    assert "needs arguments" in refused(home, "with_argument")
    assert f"{file}:broken fails: ZeroDivisionError" in refused(home, "broken")
    wrong = home / "wrong.py"
    wrong.write_text("a = 1\nb = undefined\n")
    assert "NameError" in (message := refused(home, f"{wrong}:x")) and "wrong.py line 2" in message
    wrong.write_text("def (:\n")
    assert "SyntaxError" in refused(home, f"{wrong}:x")
    wrong.write_text("from monovl_jax.config import VisionConfig\nVisionConfig(patch_size=0)\n")
    assert "patch_size" in refused(home, f"{wrong}:x")


def test_recipes_by_name() -> None:
    evip = find_recipe("evip")
    assert evip == find_recipe("evip:evip_2b") == find_recipe("monovl_jax.recipes.evip:recipe") and evip.name == "evip_2b"
    assert find_recipe("evip_plus_plus").model.decoder.experts == "ffn+attention"
    sft = find_recipe("sft", tiny())
    assert sft.copy_experts_before is None and sft.stages[0].steps == 5_197 and sft.stages[0].warmup_steps == 156
    assert sft.model == dataclasses.replace(tiny(), max_tiles=6)
    assert find_recipe("sft:lora", tiny()).stages[0].trainable == ()
    with pytest.raises(RecipeError, match="sft:recipe works on a model you bring; give --init"):
        find_recipe("sft")
    cut = adapted(evip, ["S2", "S1.3"], steps=7, seed=5)
    assert [s.name for s in cut.stages] == ["S1.3", "S2"] and {(s.steps, s.warmup_steps, s.seed) for s in cut.stages} == {(7, 7, 5)}
    assert cut.copy_experts_before is None and cut.seed == 5
    assert adapted(evip) == evip
    with pytest.raises(RecipeError, match="steps is 0"):
        adapted(evip, steps=0)
    changed = adapted(evip, ["S2"], batch_size=4, accumulation=2, trainable=("^vision/",), learning_rate=None).stages[0]
    assert (changed.batch_size, changed.accumulation, changed.trainable) == (4, 2, ("^vision/",))
    assert changed.learning_rate == evip.stage("S2").learning_rate


def test_mistakes_are_named_before_anything_compiles(home: Path, trained: tuple[Path, str, str]) -> None:
    assert "trainable pattern '^vision_model/' matches no parameter" in refused(home, "unknown")
    assert "has no stage 'S3'; it has: S1.1, S2" in refused(home, stages=("S3",))
    message = refused(home, "evip")
    assert "asks for the data sets 'laion_2b', 'coyo_700m'" in message and "it has 'street', 'words'" in message
    assert "no tokenizer; give --tokenizer" in refused(home, tokenizer=None)
    assert "neither tokenizer.json nor tokenizer.model" in refused(home, tokenizer=home)
    assert "ids up to 102" in (message := refused(home, "small_vocabulary")) and "decoder.vocab_size 50" in message
    assert "is no folder" in refused(home, init=home / "none")
    assert "decoder.hidden_size is 64 there and 128 in the recipe" in refused(home, "larger", init=trained[0])
    assert "stage 'S9' has not finished; finished: S1.1, S2" in refused(home, init=trained[0], init_stage="S9")


def test_the_vocabulary_must_have_the_picture_tokens(home: Path, tmp_path: Path) -> None:
    text = (home / "tokenizer" / "tokenizer.json").read_text().replace("<IMG_CONTEXT>", "<SOMETHING>")
    (tmp_path / "tokenizer.json").write_text(text)
    assert "has no special token <IMG_CONTEXT>" in refused(home, tokenizer=tmp_path)


CODE = "raise SystemExit('a file of the model folder was run')\n"
TRAVELS = {
    "generation_config.json": '{"eos_token_id": [2, 92542]}',
    "preprocessor_config.json": '{"crop_size": 448}',
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "special_tokens_map.json": "{}",
    "LICENSE": "a licence",
    "configuration_x.py": CODE,
    "modeling_x.py": CODE,
    "tokenization_x.py": CODE,
}
"""Beside weights, config.json and tokenizer.json: what other programs need, as it is."""


@pytest.fixture(scope="module")
def released(home: Path) -> Path:
    """A folder in the released layout with everything that a public model has beside its weights."""
    folder = write_model(home / "released", tiny(), random_upstream(tiny()))
    (folder / "added_tokens.json").unlink()
    tiny_tokenizer().save(folder)
    for name, text in TRAVELS.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("stays")
    (folder / "code").mkdir()
    (folder / "code" / "more.py").write_text(CODE)
    return folder


def weightless(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".py", ".jinja", "")}


def claimed(home: Path, run: Path, start: Path) -> set[str]:
    """Names of the files in a run directory when the first batch is asked for; nothing is trained."""
    seen: list[set[str]] = []

    def batches(self: launch.Launch, stage: Any, position: int) -> Iterator[Any]:
        seen.append({path.name for path in run.iterdir()})
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "batches", batches)
        code, _, err = command(home, run_dir=run, init=start, tokenizer=None, stages=("S1.1",), steps=1)
    assert code == 130, err
    return seen[0]


def test_the_files_of_a_run_are_there_before_its_first_batch(home: Path, released: Path) -> None:
    """They are written when the run is claimed, not by the thread that reads batches."""
    assert claimed(home, home / "runs" / "claimed", released) >= {
        *TRAVELS, "config.json", "tokenizer.json", "data.json", "experiment.json"
    }  # fmt: skip


@pytest.mark.slow
def test_what_travels_with_a_model_reaches_its_runs_and_their_exports(home: Path, released: Path, tmp_path: Path) -> None:
    """Released folder -> run -> export, and -> a run from that run: the same files, the same stop ids."""
    first, second = home / "runs" / "first", home / "runs" / "again"
    code, _, err = command(home, run_dir=first, init=released, tokenizer=None, stages=("S1.1",), steps=1)
    assert code == 0, err
    export(first, tmp_path / "out")
    exported = weightless(tmp_path / "out")
    assert exported.keys() == {*TRAVELS, "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    claimed(home, second, first)
    for found in (exported, weightless(second)):
        assert {name: found[name].decode() for name in TRAVELS} == TRAVELS
    assert json.loads(exported["generation_config.json"])["eos_token_id"] == [2, 92542]


def test_with_a_tokenizer_of_its_own_a_run_mixes_no_tokenizers(home: Path, released: Path) -> None:
    files = [(path.parent.name, path.name) for path in model_files(home / "tokenizer", released)]
    of_tokenizer = {"special_tokens_map.json", "tokenization_x.py", "chat_template.jinja"}
    assert sorted(files) == sorted(
        [("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json")]
        + [("released", name) for name in TRAVELS.keys() - of_tokenizer]
    )
    assert [path.name for path in model_files(home / "tokenizer", None)] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["LICENSE", "modeling_x.py", "special_tokens_map.json"])
def test_a_link_out_of_the_model_folder_is_not_followed(home: Path, released: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(released, tmp_path / "linked")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "linked" / name).unlink()
    (tmp_path / "linked" / name).symlink_to(tmp_path / "secret")
    message = refused(home, init=tmp_path / "linked", tokenizer=None)
    assert f"{name} is a link to {tmp_path / 'secret'}, outside its folder" in message


def test_foreign_run_directories(home: Path, trained: tuple[Path, str, str], tmp_path: Path) -> None:
    run = trained[0]
    for options, difference in (
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"steps": 9}, "stages[S1.1].steps is 3 there and 9 here"),
        ({"verify_images": True}, "identity.verify_images is False there and True here"),
        ({"init": run, "init_stage": "S1.1"}, "identity.initial"),
    ):
        assert difference in refused(home, run_dir=run, **options)
    (tmp_path / "config.json").write_text(config_to_json(tiny()))
    assert "it is a model folder, not a run" in refused(home, run_dir=tmp_path)
    assert (tmp_path / "config.json").read_text() == config_to_json(tiny())
    assert "has no weights" in refused(home, init=tmp_path)
    assert "is a file" in refused(home, run_dir=home / "meta.json")


def test_a_run_notices_that_its_data_changed(home: Path, trained: tuple[Path, str, str], tmp_path: Path) -> None:
    """Other lines are another experiment; a picture that went is noticed by the count, once the index is made again."""
    copy, other = tmp_path / "home", tmp_path / "home" / "runs" / "trained"
    shutil.copytree(home, copy, symlinks=True, ignore=shutil.ignore_patterns("second", "checked", "index"))
    (copy / "pictures" / "a.png").unlink()
    assert "the data set 'street' has 5 good samples now and had 7" in refused(copy, run_dir=other)
    with open(copy / "words.jsonl", "ab") as stream:
        stream.write(line(None))
    assert "identity.data.words.annotation" in refused(copy, run_dir=other)


BAD_META = {
    "does not exist": None,
    "cannot be read as JSON": "{",
    "holds no data set": "{}",
    "is a JSON list": '{"a": []}',
    "may not be empty or '*'": '{"*": {}}',
    "unknown field 'repeat'; the fields are root, annotation": '{"a": {"annotation": "a.jsonl", "repeat": 2}}',
    "annotation is None": '{"a": {"root": "."}}',
    "the annotation": '{"a": {"annotation": "b.jsonl"}}',
    "is not a folder": '{"a": {"annotation": "a.jsonl", "root": "b"}}',
    "data_augment is 1": '{"a": {"annotation": "a.jsonl", "data_augment": 1}}',
    "repeat_time is 1.5": '{"a": {"annotation": "a.jsonl", "repeat_time": 1.5}}',
    "repeat_time is 1e+300": '{"a": {"annotation": "a.jsonl", "repeat_time": 1e300}}',
    "at most 256 tiles": '{"a": {"annotation": "a.jsonl", "max_dynamic_patch": 1000000}}',
    "Infinity is no number": '{"a": {"annotation": "a.jsonl", "repeat_time": Infinity}}',
    "repeat_time is 0": '{"a": {"annotation": "a.jsonl", "repeat_time": 0}}',
    "max_dynamic_patch is 0": '{"a": {"annotation": "a.jsonl", "max_dynamic_patch": 0}}',
}


@pytest.mark.parametrize("message", BAD_META)
def test_a_meta_file_that_cannot_be_used(tmp_path: Path, message: str) -> None:
    (tmp_path / "a.jsonl").touch()
    if BAD_META[message] is not None:
        (tmp_path / "meta.json").write_text(BAD_META[message])
    with pytest.raises(MetaError, match=r"meta\.json") as caught:
        read_meta(tmp_path / "meta.json")
    assert message in str(caught.value)


def test_shares() -> None:
    sizes = {"a": 30.0, "b": 10.0, "ocr": 5.0, "none": 0.0}
    assert shares({"ocr": 1, "*": 3}, sizes) == {"ocr": 1, "a": 2.25, "b": 0.75}
    assert shares({"b": 2.0}, sizes) == {"b": 2.0}


def test_tiles_fit_the_row_of_the_stage(home: Path) -> None:
    """max_dynamic_patch of META.json, else the model's, and never more than a row holds with the thumbnail."""
    model = dataclasses.replace(tiny(), max_tiles=12, use_thumbnail=True)
    sets = read_meta(home / "meta.json")
    data = launch.OwnData(model, tiny_tokenizer(), sets, BadSamples(), home, 0, strict=False, verify_images=False, say=print)
    street, words = (data.sets[name] for name in ("street", "words"))
    assert [data.tiling(words, room).max_tiles for room in (0, 1, 5, 13, 25)] == [12, 1, 4, 12, 12]
    assert [data.tiling(street, room).max_tiles for room in (1, 3, 25)] == [1, 2, 3]


def test_jpeg_recompression_depends_on_the_seed_alone() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    once = recompress(tiles, (0, 5))
    assert once.shape == tiles.shape and once.dtype == np.uint8 and (once != tiles).any()
    assert np.array_equal(once, recompress(tiles, (0, 5))) and not np.array_equal(once, recompress(tiles, (0, 6)))
    smooth = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], (1, 16, 16, 3)).copy()
    assert np.abs(recompress(smooth, (1,)).astype(int) - smooth).max() < 16, "a smooth tile survives nearly unchanged"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (
            b"[\n" + line(None).rstrip() + b"]\n",
            {},
            r"'only' .*d\.jsonl.* has no sample to train on: 2 bad ones, the first in line 1: .*bad_samples\.jsonl",
        ),
        (b"", {}, r"'only' .* has no sample to train on: 0 bad ones, the first in line 0: it is empty"),
        (line(None, question="what") * 2, {"repeat_time": 0.1}, r"'only' .* repeat_time 0\.1 of its 2 good samples leaves none; raise it"),
    ],
)
def test_a_data_set_without_samples_is_named(
    text: bytes, settings: dict, message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "d.jsonl").write_bytes(text)
    (tmp_path / "META.json").write_text(json.dumps({"only": {"annotation": "d.jsonl", **settings}}))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.replace('{"street": 3.0, "words": 1.0}', '{"*": 1.0}'))
    code = cli.train(f"{recipe}:one", data=tmp_path / "META.json", tokenizer=home / "tokenizer", run_dir=tmp_path / "run", check=True)
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_nothing_can_use(seed: int) -> None:
    recipe = find_recipe("evip")
    with pytest.raises(RecipeError, match=f"seed is {seed}; give a number from 0 to 4294967295"):
        adapted(recipe, (), None, seed)
