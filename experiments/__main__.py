"""Lists every experiment with its claim and what came out: `python -m experiments`."""

from __future__ import annotations

import ast
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split())


def is_command(path: Path) -> bool:
    """Whether a file is run by its name."""
    return path.name not in ("__init__.py", "__main__.py") and '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def result(name: str) -> str:
    """The verdict of an ablation on the CPU, where it has run."""
    path = HERE / "results" / "ablations" / name / "summary.json"
    return f"   [{json.loads(path.read_text(encoding='utf-8'))['verdict'] or 'measured'}]" if path.is_file() else ""


def main() -> None:
    """Prints the list."""
    for path in sorted(HERE.rglob("*.py")):
        if is_command(path):
            name = ".".join(("experiments", *path.relative_to(HERE).with_suffix("").parts))
            print(f"python -m {name}{result(path.stem)}\n    {first_line(path)}")
    print("\npython -m experiments.ablations (make ablations) runs all ablations, and goes on where it was stopped.")


if __name__ == "__main__":
    main()
