"""Every command in the documentation is one that `monovl` takes."""

from __future__ import annotations

import functools
import re
import shlex
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from monovl_jax import cli
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of code blocks that begin with `monovl`, without comments; lines that end in a backslash joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("monovl "):
                found.append(line.strip())
    return found


def parsed(arguments: list[str]) -> None:
    """Reads a command line as `monovl` does, and calls nothing."""
    table: dict[str, Any] = {}
    for name, function in cli.COMMANDS.items():
        subcommands = {
            settings.name: settings.constructor
            for union in typing.get_type_hints(function, include_extras=True).values()
            for member in typing.get_args(union)
            for settings in getattr(member, "__metadata__", ())
            if getattr(settings, "constructor", None) is not None
        }
        table |= {f"{name}:{sub}": silent(made) for sub, made in subcommands.items()} or {name: silent(function)}
    both = ":".join(arguments[:2])
    command, rest = (both, arguments[2:]) if both in table else (arguments[0], arguments[1:])
    plain = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    tyro.cli(table[command], args=rest, prog="monovl", config=plain)


def silent(function: Callable[..., Any]) -> Callable[..., int]:
    return functools.wraps(function)(lambda *_, **__: 0)


def test_commands_of_every_kind_are_parsed() -> None:
    """That the test below can fail: it knows subcommands, their options and their arguments."""
    parsed(["convert", "export", "src", "dst", "--shard-gb", "2"])
    too_little = (["convert", "export", "src"], ["generate"])
    for wrong in (*too_little, ["checkpoints", "ls", "run", "--nonsense"], ["data", "prepare", "META.json", "out", "--what"]):
        with pytest.raises(SystemExit):
            parsed(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        arguments = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
        if any(word in ("|", "RECIPE") or word.startswith("[") for word in arguments):
            continue  # a sketch, not a command
        try:
            parsed(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: `{command}` is not understood: {capsys.readouterr()}", pytrace=False)


def test_options_in_tables_exist() -> None:
    """`--name` in a page about one command is an option of some command."""
    known = set()
    for path in (ROOT / "monovl_jax").rglob("*.py"):
        known |= {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.M)}
    known |= {"mesh.data", "mesh.fsdp", "mesh.tensor", "json", "help"}
    for page in (ROOT / "docs" / "inference.md", ROOT / "docs" / "training.md"):
        for name in re.findall(r"^\| `--([\w.-]+)", page.read_text(encoding="utf-8"), re.M):
            assert name.removeprefix("no-") in known, f"{page.name}: --{name} is no option"
