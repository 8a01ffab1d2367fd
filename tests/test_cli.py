"""The command line as a user meets it: arguments, exit codes, one sentence on stderr."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from monovl_jax import cli
from monovl_jax.training.preemption import PreemptedError
from tests.conftest import ROOT


def parsed(command: str, *arguments: str) -> dict:
    """What a command function is called with."""
    seen: dict = {}
    function = cli.COMMANDS[command]

    def record(*args, **kwargs) -> int:
        seen.update(dict(zip(function.__annotations__, args, strict=False)), **kwargs)
        return 0

    record.__annotations__, record.__doc__, record.__name__ = function.__annotations__, function.__doc__, function.__name__
    record.__wrapped__ = function  # pyright: ignore[reportFunctionMemberAccess]
    tyro.cli(record, args=list(arguments))
    return seen


def test_arguments_of_train() -> None:
    seen = parsed("train", "evip", "--data", "m.json", "--stages", "S1.1", "S2", "--strict", "--run-dir", "runs/x", "--remat", "full")
    assert (seen["recipe"], seen["data"], seen["stages"], seen["strict"]) == ("evip", Path("m.json"), ("S1.1", "S2"), True)
    assert seen["run_dir"] == "runs/x" and seen["remat"] == "full" and seen["dtype"] is None and seen["seed"] is None


def test_train_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("train", "evip")
    assert caught.value.code == 2 and "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nonsense", "--data", "none.json"], "monovl train: no recipe is called 'nonsense'"),
        (["generate", "--model", "none", "--prompt", "x"], "monovl generate: none is no folder"),
        (["generate", "--model", "none"], "monovl generate: give --prompt (and --image), or --jsonl and --out"),
        (["generate", "--model", "none", "--jsonl", "x"], "monovl generate: give --prompt"),
        (["chat", "none"], "monovl chat: none is no folder"),
        (["convert", "export", "none", "out"], "monovl convert export: none is no imported model"),
        (["convert", "inspect", "none"], "monovl convert inspect: none"),
        (["train", "sft", "--data", "none.json"], "monovl train: sft:recipe works on a model you bring; give --init"),
        (["parity"], "monovl parity: give at least one case folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "monovl_jax.cli", *arguments], cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False
    )
    assert child.returncode == 2 and child.stdout == "" and child.stderr.startswith(message) and child.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_parity_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parity((tmp_path,), json_output=True) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["exit_code"] == 2 and str(tmp_path) in printed["cases"][0]["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="the restart is for Linux")
@pytest.mark.parametrize(
    ("arguments", "restarts"),
    [
        (["train", "sft"], True),
        (["chat", "runs/demo"], True),
        (["--help"], False),
        (["train", "--help"], False),
        (["convert", "ls"], False),
        ([], False),
    ],
)
def test_only_a_command_that_computes_starts_again(arguments: list[str], restarts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Python's own options: -X, -W and -m of whoever started it."""
    started: list[list[str]] = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "argv", ["monovl", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "monovl_jax", *arguments])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(os, "execv", lambda program, line: started.append([program, *line]))
    cli._prefer_huge_pages()
    assert started == ([[sys.executable, sys.executable, "-X", "dev", "-m", "monovl_jax", *arguments]] if restarts else [])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "gettrace", lambda: print)  # a debugger
    cli._prefer_huge_pages()
    assert len(started) == restarts


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (PreemptedError("stopped by SIGTERM"), 143), (OSError("no"), 2)])
def test_a_demo_that_is_stopped_says_one_sentence(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr("monovl_jax.demo.run.demo", stop)
    assert cli.demo() == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"batch_size": -3}, {"max_new_tokens": 0}])
def test_numbers_out_of_bounds_are_one_sentence(option: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.generate(model=tmp_path, prompt="x", **option) == 2
    (name,) = option
    assert f"--{name.replace('_', '-')} is {option[name]}; give a number from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("stall_seconds", -1.0), ("stall_seconds", float("nan")), ("preemption_exit_code", 999), ("threads", 0), ("threads", -1)],
)
def test_numbers_of_a_run_out_of_bounds_are_one_sentence(option: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.train("evip", data=tmp_path, **{option: value}) == 2
    error = capsys.readouterr().err
    assert f"--{option.replace('_', '-')} is {value}; give " in error and len(error.splitlines()) == 1


def test_a_bound_of_the_cache_that_a_user_gave_is_kept(run_python: Callable[..., str], tmp_path: Path) -> None:
    code = """
import jax
from monovl_jax.inference.compiling import keep_programs
keep_programs()
print(jax.config.jax_compilation_cache_max_size)
"""
    cache = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert run_python(code, **cache).strip() == str(4 << 30)
    assert run_python(code, **cache, JAX_COMPILATION_CACHE_MAX_SIZE="1000000").strip() == "1000000"


def test_a_closed_event_loop_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax leaves one behind when an array cannot be read; other errors that nobody can catch are still told."""
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    cli.quiet_orbax()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))  # pyright: ignore[reportArgumentType]
    assert told == ["another", "Event loop is closed"]
