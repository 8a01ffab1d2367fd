"""`monovl parity`: recorded cases pass, wrong ones fail, strange ones are refused with a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from monovl_jax import cli
from monovl_jax.evaluation.parity import UnknownCase, run_case
from monovl_jax.inference import generate
from tests.quick import quick_jit

GROUPS = ("mono_internvl", "mono_internvl_1_5")
SMALL = Path(__file__).parents[1] / "golden"
FULL = Path(os.environ.get("MONOVL_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
NTK = SMALL / "mono_internvl" / "ntk_dynamic_long"


def cases(root: Path) -> list[Path]:
    return sorted(p.parent for g in GROUPS for p in root.glob(f"{g}/*/case.json"))


def show(path: Path | None) -> str:
    return f"{path.parent.name}/{path.name}" if path else "absent"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same programs, compiled without XLA's slower optimisations."""
    names = ("graphdef", "ops", "max_new_tokens", "keep_scores")
    monkeypatch.setattr(jax, "jit", quick_jit)
    monkeypatch.setattr("monovl_jax.evaluation.parity.greedy", quick_jit(generate.greedy.__wrapped__, static_argnames=names))


def failures(folder: Path) -> list[Any]:
    checks = run_case(folder)
    compared = json.loads((folder / "case.json").read_text())["compare"]
    assert [c.name for c in checks] == list(compared), "every compared output once, in order"
    return [c for c in checks if not c.passed]


@pytest.mark.parametrize("folder", cases(SMALL), ids=show)
@pytest.mark.usefixtures("quick")
def test_small_copies(folder: Path) -> None:
    assert not failures(folder)


def test_the_small_copies_are_there_and_small() -> None:
    assert len(cases(SMALL)) == 4
    assert sum(p.stat().st_size for g in GROUPS for p in (SMALL / g).rglob("*") if p.is_file()) < 4e6


@pytest.mark.slow
@pytest.mark.parametrize("folder", cases(FULL) or [None], ids=show)
def test_all_recorded_cases(folder: Path | None) -> None:
    """Compiled as users compile."""
    if folder is None:
        print(reason := f"no recorded cases under {FULL}")
        pytest.skip(reason)
    if (folder / "pytorch_model.bin").is_file():
        pytest.importorskip("torch", reason=f"{show(folder)} has PyTorch weights")
    assert not failures(folder)


# ---- changed cases


def copy(tmp_path: Path, only: list[str] | None = None, name: str = "case", **changes: Any) -> Path:
    """A copy of the small NTK case that compares `only` these outputs, with fields of case.json changed (`...` removes one)."""
    folder = shutil.copytree(NTK, tmp_path / name)
    case = json.loads((folder / "case.json").read_text())
    if only is not None:
        case["compare"] = {k: case["compare"][k] for k in only}
    case |= changes
    (folder / "case.json").write_text(json.dumps({k: v for k, v in case.items() if v is not ...}))
    return folder


def edit_arrays(path: Path, **changes: Any) -> None:
    """Changes arrays of an .npz: a value, a function of the old one, or `...` to remove it."""
    arrays = dict(np.load(path))
    for name, change in changes.items():
        arrays[name] = change(arrays[name]) if callable(change) else change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not ...})


def bump(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a[tuple(n - 1 for n in a.shape)] += 1e-3
    return a


@pytest.mark.usefixtures("quick")
def test_a_generation_ends_with_its_end_token(tmp_path: Path) -> None:
    """The recorded ids, cut after one of them: greedy decoding to that token gives just these."""
    ids = np.load(NTK / "outputs.npz")["generated_ids"]
    stop = 4
    assert ids[0, stop] not in ids[0, :stop]
    folder = copy(tmp_path, ["generated_ids", "gen_scores"], generate={"eos": int(ids[0, stop])})
    edit_arrays(folder / "outputs.npz", generated_ids=ids[:, : stop + 1], gen_scores=lambda a: a[: stop + 1])
    assert not failures(folder)
    edit_arrays(folder / "outputs.npz", generated_ids=ids[:, : stop + 2], gen_scores=...)  # theirs went on where ours stops
    case = json.loads((folder / "case.json").read_text())
    case["compare"].pop("gen_scores")
    (folder / "case.json").write_text(json.dumps(case))
    (check,) = run_case(folder)
    assert not check.passed and "shape (1, 5), recorded (1, 6)" in check.note


@pytest.mark.parametrize(("change", "note"), [(bump, ""), (lambda a: a * np.nan, ""), (lambda a: a[:1], "recorded (1, 4, 64)")])
@pytest.mark.usefixtures("quick")
def test_one_wrong_number_fails(tmp_path: Path, change: Callable, note: str) -> None:
    folder = copy(tmp_path, ["vit_embeds"])
    edit_arrays(folder / "outputs.npz", vit_embeds=change)
    (check,) = run_case(folder)
    assert not check.passed and note in check.note


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setenv("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES", ""))  # main() restarts the process when it is unset
    monkeypatch.setattr(sys, "argv", ["monovl", "parity", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = copy(tmp_path, ["vit_embeds"], "good")
    bad = copy(tmp_path, ["vit_embeds"], "bad")
    edit_arrays(bad / "outputs.npz", vit_embeds=bump)
    strange = copy(tmp_path, name="strange", group="diffusion")

    assert run_cli(monkeypatch, good) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"PASS  {tmp_path.name}/good  vit_embeds  ") and "[atol 2e-05 rtol 1e-05]" in out and not err

    assert run_cli(monkeypatch, good, bad) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["PASS", "FAIL"]

    assert run_cli(monkeypatch, strange) == 2
    assert "group 'diffusion' is not supported; known: preprocess, mono_internvl" in capsys.readouterr().err

    assert run_cli(monkeypatch, tmp_path / "absent") == 2
    assert "absent is no folder" in capsys.readouterr().err
    assert run_cli(monkeypatch, good / "case.json") == 2
    assert run_cli(monkeypatch) == 2
    capsys.readouterr()

    assert run_cli(monkeypatch, good, bad, strange, "--json") == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["exit_code"] == 1 and [Path(c["case"]).name for c in result["cases"]] == ["good", "bad", "strange"]
    first, second = (case["checks"][0] for case in result["cases"][:2])
    assert (first["name"], first["passed"], second["passed"]) == ("vit_embeds", True, False)
    assert second["max_abs_diff"] == pytest.approx(1e-3, rel=0.1) and "diffusion" in result["cases"][2]["error"]


def spoil(name: str, content: bytes | None) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


def inputs(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_arrays(folder / "inputs.npz", **changes)


RULE = {"atol": 1e-5}
LOGITS = {"logits": RULE}


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({"group": None}, None, "group None is not supported"),
        ({"group": ...}, None, "group None is not supported"),
        ({"compare": {"logits": {}}}, None, r"compare\['logits'\] is \{\}; expected exact"),
        ({"compare": {"logits": 3}}, None, r"compare\['logits'\] is 3; expected exact"),
        ({"compare": {"logits": {"atol": "small"}}}, None, r"compare\['logits'\]"),
        ({"compare": ["logits"]}, None, r"compare is \['logits'\]; expected an object"),
        ({"compare": {}}, None, r"compare is \{\}; expected an object"),
        ({"compare": {"loss": RULE}}, None, "'loss' is compared, but not recorded"),
        ({"compare": {"future": RULE}}, lambda f: edit_arrays(f / "outputs.npz", future=np.zeros(1)), "how to compute the output 'future'"),
        ({"compare": {"grad:x": RULE}}, lambda f: edit_arrays(f / "outputs.npz", **{"grad:x": np.zeros(1)}), "no labels"),
        ({"compare": {"loss": RULE}}, lambda f: edit_arrays(f / "outputs.npz", loss=np.zeros(())), "a loss is compared.*no labels"),
        ({"img_context_token_id": ..., "compare": LOGITS}, inputs(img_context_token_id=...), "img_context_token_id is missing"),
        ({"img_context_token_id": "IMG", "compare": LOGITS}, None, "img_context_token_id is 'IMG'; expected a token id"),
        ({"compare": LOGITS}, inputs(input_ids=...), "no input_ids"),
        ({"compare": LOGITS}, inputs(input_ids=lambda a: a[0]), r"input_ids is missing or not \[rows, tokens\]"),
        ({"compare": LOGITS}, inputs(pixel_values=...), "visual slots but no pixel_values"),
        ({"compare": LOGITS}, inputs(pixel_values=lambda a: a[:1], image_flags=lambda a: a[:1]), "8 visual slots for 1 flagged tiles"),
        ({"compare": LOGITS}, inputs(pixel_values=lambda a: a[0]), r"pixel_values has shape \(3, 56, 56\)"),
        ({"compare": LOGITS}, inputs(pixel_values=lambda a: a[:, :, :-14]), "42 x 56; tiles are square"),
        ({"compare": LOGITS}, inputs(attention_mask=lambda a: a[:, 1:]), r"attention_mask has shape \(1, 44\), but input_ids \(1, 45\)"),
        ({"compare": LOGITS}, inputs(image_flags=lambda a: a[:1]), "image_flags has 1 entries for 2 tiles"),
        ({"compare": LOGITS}, inputs(input_ids=lambda a: a + 10_000), r"input_ids must lie in \[0, 320\)"),
        ({"compare": {"generated_ids": RULE}, "generate": {"eos": "end"}}, None, "generate.eos is 'end'"),
        ({}, spoil("inputs.npz", None), r"inputs\.npz is no readable \.npz"),
        ({}, spoil("inputs.npz", b"PK\x03\x04 and no more"), r"inputs\.npz is no readable \.npz"),
        ({}, spoil("outputs.npz", b""), r"outputs\.npz is no readable \.npz"),
        ({}, spoil("case.json", b"{"), r"case\.json is not valid JSON"),
        ({}, spoil("case.json", b"[]"), "expected an object"),
        ({}, spoil("case.json", None), "case"),
        ({}, spoil("config.json", None), r"config\.json does not exist"),
        ({}, spoil("config.json", b"{}"), r"config\.json: vision_config is missing"),
        ({}, spoil("model.safetensors", None), "has no weights"),
        ({}, spoil("model.safetensors", b"\0" * 40), "no readable safetensors"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_what_is_not_understood(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    spoil: Callable[[Path], None] | None,
    message: str,
) -> None:
    folder = copy(tmp_path, **changes)
    if spoil:
        spoil(folder)
    assert run_cli(monkeypatch, folder) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) <= 3
    assert re.search(message, err), err


def test_an_unknown_case_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownCase, match="is no folder"):
        run_case(tmp_path / "absent")
